// The emulated GPU.
#pragma once
#include <cstddef>

namespace emu {

constexpr size_t kSharedBytesPerBlock = 227 << 10;  // of sm_90; sm_80 has 163 KB

struct Device {
  unsigned seed = 0;
  unsigned launches_since_seeded = 0;
  int resident_blocks = 4;
  bool cooperative = true;
  bool has_refused = false;
};
extern Device device;

}  // namespace emu
