// What tests ask about the launches of a call.
#pragma once

namespace emu {

struct Statistics {
  long launches = 0;
  long blocks = 0;
  long ldmatrix_phases = 0;  // matrices read
  long ldmatrix_cycles = 0;  // equal to the phases where no bank conflicts
  long refusals = 0;         // of cooperative launches
};
extern Statistics statistics;

}  // namespace emu
