// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include <kvferry/tcp/frame.hpp>

namespace kvferry::inline KVFERRY_ABI::hostile {

/// Writes TLS's records as nobody's library would: any type, any length.
class Records {
 public:
  explicit Records(const std::array<unsigned char, 32>& secret)
      : secret_(secret), cipher_(EVP_CIPHER_CTX_new(), &EVP_CIPHER_CTX_free) {
    set_keys();
  }

  static constexpr unsigned char alert = 21;
  static constexpr unsigned char handshake = 22;
  static constexpr unsigned char data = 23;

  void add(unsigned char type, std::string_view content) {
    std::array<unsigned char, 12> nonce = iv_;
    for (std::size_t i = 0; i < 8; ++i) {
      nonce[11 - i] ^= static_cast<unsigned char>(sequence_ >> (8 * i));
    }
    ++sequence_;
    const std::size_t size = content.size() + 1 + tag;
    const std::array<unsigned char, 5> header{data, 3, 3, static_cast<unsigned char>(size >> 8),
                                              static_cast<unsigned char>(size)};
    const std::size_t begin = bytes_.size();
    bytes_.resize(begin + header.size() + size);
    auto* const to = reinterpret_cast<unsigned char*>(bytes_.data()) + begin;
    std::memcpy(to, header.data(), header.size());
    std::memcpy(to + header.size(), content.data(), content.size());
    to[header.size() + content.size()] = type;
    int written = 0;
    EVP_EncryptInit_ex(cipher_.get(), nullptr, nullptr, nullptr, nonce.data());
    EVP_EncryptUpdate(cipher_.get(), nullptr, &written, header.data(), static_cast<int>(header.size()));
    EVP_EncryptUpdate(cipher_.get(), to + header.size(), &written, to + header.size(),
                      static_cast<int>(content.size() + 1));
    EVP_EncryptFinal_ex(cipher_.get(), to + header.size() + written, &written);
    EVP_CIPHER_CTX_ctrl(cipher_.get(), EVP_CTRL_AEAD_GET_TAG, tag, to + header.size() + content.size() + 1);
  }
  /// A KeyUpdate, and what follows from it.
  void change_key(bool asks) {
    add(handshake, std::string_view(asks ? "\x18\0\0\1\1" : "\x18\0\0\1\0", 5));
    secret_ = expand<32>("traffic upd");
    set_keys();
  }
  /// The bytes that have been added since the last call.
  [[nodiscard]] std::string take() { return std::exchange(bytes_, {}); }
  [[nodiscard]] std::size_t size() const noexcept { return bytes_.size(); }

 private:
  static constexpr std::size_t tag = 16;

  /// HKDF-Expand-Label (RFC 8446, 7.1), of at most one hash.
  template <std::size_t Size>
  [[nodiscard]] std::array<unsigned char, Size> expand(std::string_view label) const {
    std::string info{0, static_cast<char>(Size), static_cast<char>(6 + label.size())};
    info += "tls13 ";
    info += label;
    info += std::string_view("\0\1", 2);
    std::array<unsigned char, 32> whole{};
    HMAC(EVP_sha256(), secret_.data(), static_cast<int>(secret_.size()),
         reinterpret_cast<const unsigned char*>(info.data()), info.size(), whole.data(), nullptr);
    std::array<unsigned char, Size> part{};
    std::copy_n(whole.begin(), Size, part.begin());
    return part;
  }
  void set_keys() {
    const auto key = expand<16>("key");
    iv_ = expand<12>("iv");
    sequence_ = 0;
    EVP_EncryptInit_ex(cipher_.get(), EVP_aes_128_gcm(), nullptr, key.data(), iv_.data());
  }

  std::array<unsigned char, 32> secret_;
  std::array<unsigned char, 12> iv_{};
  std::uint64_t sequence_ = 0;
  const std::unique_ptr<EVP_CIPHER_CTX, decltype(&EVP_CIPHER_CTX_free)> cipher_;
  std::string bytes_;
};

/// Of writes without end to pages of the hub's.
class Writing {
 public:
  Writing() {
    constexpr std::size_t page = 4096;
    constexpr std::size_t objects = tcp::max_chunk_bytes / page;
    tcp::FrameHeader header;
    header.count = objects;
    header.payload_bytes = objects * page;
    header.flags = tcp::FrameHeader::last_chunk;
    append(header);
    for (std::size_t i = 0; i < objects; ++i) {
      append(tcp::Descriptor{63, page});
    }
    bytes_.resize(bytes_.size() + header.payload_bytes);
    append(tcp::FrameTrailer{});
  }
  [[nodiscard]] std::string_view next() {
    const std::string_view one = std::string_view(bytes_).substr(at_, 1);
    at_ = (at_ + 1) % bytes_.size();
    return one;
  }

 private:
  template <class Part>
  void append(const Part& part) {
    bytes_.append(reinterpret_cast<const char*>(&part), sizeof(part));
  }

  std::string bytes_;
  std::size_t at_ = 0;
};

}  // namespace kvferry::hostile
