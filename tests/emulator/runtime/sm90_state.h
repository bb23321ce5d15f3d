// What sm_90's instructions leave in a block, a warp and a thread.
#pragma once
#include <map>
#include <memory>
#include <vector>

#include "sm90.h"
#include "tensor_map.h"

namespace emu {

struct Mbarrier {
  unsigned count = 0, pending = 0;  // arrivals of a phase, and those that are missing
  int64_t bytes = 0;                // that are missing
  int phase = 0;
  bool fenced = false;             // its initialisation, for the async proxy
  std::map<unsigned, int> waited;  // {thread: the phase that it last waited for}
};

struct NamedBarrier {
  unsigned threads = 0, arrived = 0, generation = 0;
};

struct BulkCopy {
  std::vector<Row> rows;
  uint32_t row_bytes;
  int swizzle_bits;
  uint32_t shared;
  uint32_t barrier_or_group;  // that a load completes, that a store belongs to
  bool tf32;
};

struct BlockState {
  std::map<uint32_t, Mbarrier> mbarriers;
  std::map<uint32_t, NamedBarrier> named_barriers;
  std::vector<BulkCopy> loads;  // that have not arrived
  unsigned free_registers = 0;  // of the multiprocessor's 64 K
  // Shared memory as the async proxy, that is TMA and wgmma, sees it: without what was written since the last fence.
  std::unique_ptr<unsigned char[]> async_view;
};

struct ThreadState {
  std::vector<BulkCopy> stores;  // that have not read shared memory
  unsigned store_groups = 0;     // that were committed
};

// The rows of a tile that one warp of the warpgroup has, and where they go in its threads' registers.
struct Accumulators {
  float* registers[32];
  int columns;
  float values[16][256];
};

struct WarpState {
  struct Product {
    Wgmma operation;
    Accumulators* to;
    unsigned group;
    bool done;
  };
  std::map<float*, std::unique_ptr<Accumulators>> accumulators;  // by the first lane's first register
  std::vector<Product> products;                                 // that were not waited for, in order
  unsigned product_groups = 0;                                   // that were committed
  bool registers_fenced = false;
  unsigned registers = 0;  // of each thread
};

// Fails where the running thread leaves something undone, or the block, if it is the last one.
void end_thread(bool last);
// A load that is under way arrives; false if there is none.
bool deliver_load();
void mbarrier_complete(uint32_t barrier, uint32_t bytes);
// What the async proxy sees of the block's shared memory.
unsigned char* async_view();
// Fails unless the async proxy sees what is there.
void check_proxy(uint32_t address, uint32_t bytes, const char* reader);

}  // namespace emu
