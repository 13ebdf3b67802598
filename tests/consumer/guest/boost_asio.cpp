// SPDX-License-Identifier: Apache-2.0
#include <utility>

#include <boost/asio.hpp>

int use_boost_asio() {
  boost::asio::io_context context;
  int done = 0;
  boost::asio::post(context, [&] { ++done; });
  context.run();
  return done == 1 ? 0 : 1;
}
