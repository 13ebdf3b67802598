// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include <kvferry/rdma_transfer_channel.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma::testing {

/// A rail's network device, on a machine that this test may do as it likes with.
class NetworkDevice {
 public:
  explicit NetworkDevice(const RdmaRail& rail) {
    std::ifstream("/sys/class/infiniband/" + rail.device + "/ports/1/gid_attrs/ndevs/0") >> name_;
    // Else the IPv6 addresses, and with them their GIDs, would be gone for good.
    run("sysctl -q -w net.ipv6.conf." + name_ + ".keep_addr_on_down=1");
  }
  NetworkDevice(const NetworkDevice&) = delete;
  NetworkDevice& operator=(const NetworkDevice&) = delete;
  ~NetworkDevice() { set_up(); }

  void set_down() const { run("ip link set " + name_ + " down"); }
  void set_up() const { run("ip link set " + name_ + " up"); }

 private:
  static void run(const std::string& command) {
    if (std::system(command.c_str()) != 0) {
      ADD_FAILURE() << command;
    }
  }

  std::string name_;
};

/// Only in a virtual machine that is there for tests.
inline bool may_change_links() { return std::getenv("KVFERRY_GUEST") != nullptr; }

}  // namespace kvferry::rdma::testing
