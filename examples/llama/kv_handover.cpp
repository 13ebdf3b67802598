// SPDX-License-Identifier: Apache-2.0
// One process computes prompts, another one fetches their KV caches and goes on: README.md.
#include <random>
#include <sstream>

#include "decoder.hpp"
#include "prefiller.hpp"

using namespace handover;

int main(int argc, char** argv) try {
  Options options{{"--way", "state,inplace,layers"},
                  {"--prompts", "33,100,200,150"},
                  {"--answer", "16"},
                  {"--sequences", "4"},
                  {"--tokens", "512"},
                  {"--ubatch", "64"},
                  {"--kv", "f16"},
                  {"--checksums", "on"},
                  {"--once", "off"},
                  {"--advertise-data", ""}};
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const std::string mode = arguments.empty() ? "" : arguments[0];
  const std::size_t named = mode == "alone" ? 2 : 3;
  bool good = (mode == "alone" || mode == "prefill" || mode == "decode") && arguments.size() >= named;
  for (std::size_t i = named; good && i < arguments.size(); i += 2) {
    good = i + 1 < arguments.size() && options.contains(arguments[i]);
    if (good) options[arguments[i]] = arguments[i + 1];
  }
  if (!good) {
    std::cerr << "usage: kv_handover alone MODEL | decode MODEL URL | prefill MODEL URL; options with what they are by "
                 "default:\n";
    for (const auto& [name, value] : options) std::cerr << "  " << name << " " << value << "\n";
    return 2;
  }
  const auto number = [&](const char* name) { return static_cast<std::uint32_t>(std::stoul(options.at(name))); };
  Engine engine(arguments[1], number("--sequences"), number("--tokens"), number("--ubatch"),
                options.at("--kv") == "q8_0");
  if (mode == "decode") {
    std::vector<std::byte> states;
    kvferry::TcpOptions channel = channel_options(engine, options, states);
    channel.peer_init_url = arguments[2];
    channel.advertised_data_address = options.at("--advertise-data");
    return Decoder(engine, channel).run(options.at("--once") == "on") == 0 ? 0 : 3;
  }
  std::vector<Request> requests;
  std::istringstream lengths(options.at("--prompts"));
  for (std::string length; std::getline(lengths, length, ',');) {
    requests.push_back({Tokens(std::stoul(length)), Tokens(number("--answer"))});
    auto& [prompt, answer, ms] = requests.back();
    if (prompt.empty() || answer.size() < 2 || prompt.size() + answer.size() > engine.size()) {
      throw std::runtime_error("a prompt of " + length + " tokens or its answer is too long or too short");
    }
    std::minstd_rand random(static_cast<unsigned>(requests.size()));
    const auto vocabulary = static_cast<unsigned>(engine.vocabulary());
    std::ranges::generate(prompt, [&] { return static_cast<llama_token>(random() % vocabulary); });
  }
  if (mode == "alone") {
    answer_all("alone", engine, requests, [&](std::span<Request> some) { answer_alone(engine, some); });
    return 0;
  }
  const std::map<std::string, Kind> kinds{{"state", Kind::state}, {"inplace", Kind::inplace}, {"layers", Kind::layers}};
  std::string table =
      "ms from prefill's end to the decoder's first token:\n"
      "way      prompts       least      median       worst\n";
  std::istringstream ways(options.at("--way"));
  std::optional<Prefiller> prefiller;
  try {
    prefiller.emplace(engine, options, arguments[2]);
    for (std::string way; std::getline(ways, way, ',');) {
      if (!kinds.contains(way)) throw std::runtime_error(way + " is no way");
      table +=
          answer_all(way, engine, requests, [&](std::span<Request> some) { prefiller->answer(kinds.at(way), some); });
    }
  } catch (const std::system_error& error) {
    std::cerr << (prefiller ? "prefill: the decoder is gone: " + prefiller->explain(error) : error.what()) << std::endl;
    return 3;
  }
  std::cout << table;
  return 0;
} catch (const std::exception& error) {
  std::cerr << "kv_handover: " << error.what() << std::endl;
  return 1;
}
