// One block: its threads as fibers, its shared memory, its barriers, and who runs next.
#pragma once
#include <random>
#include <string>
#include <vector>

#include "async_copy.h"
#include "fiber.h"
#include "runtime.h"
#include "sm90_state.h"

namespace emu {

struct Warp;

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned number;  // in the block
  unsigned lane;
  Warp* warp;
  Perform* perform;  // what it waits for its warp to do, with its mask and operand
  unsigned mask;
  void* operand;
  std::vector<AsyncCopy> copies;  // that have not arrived, in order
  unsigned groups = 0;            // that were committed
  const void* event = nullptr;    // that it waits for, and its name
  const char* event_name = "";
  ThreadState sm90;
};

struct Warp {
  Thread* threads[32] = {};
  unsigned alive = 0, ready = 0, collecting = 0;  // sets of lanes; `collecting` wait in a collective
  unsigned first = 0;                             // the lane that runs first
  unsigned collectives = 0;
  char order[2];  // objects to release and acquire, of __syncwarp
  WarpState sm90;
};

class Block {
 public:
  struct Launch {
    void (*body)(const void*);
    const void* closure;
    dim3 grid, block;
    size_t shared_bytes;
    bool cooperative;
    unsigned seed;  // 0: warps and lanes in order
  };

  // On the OS thread on which run() will be called.
  Block(const Launch& launch, uint3 index);
  ~Block();
  Block(const Block&) = delete;

  // Until all threads wait at the grid barrier, or are done, or one failed.
  void run();
  bool at_grid_barrier() const { return failure_.empty() && alive_ > 0; }
  void pass_grid_barrier();
  const std::string& failure() const { return failure_; }

  // ---- called by the running thread ----
  [[noreturn]] void fail(const std::string& message);
  int barrier(bool predicate, const char* file, int line);
  void grid_barrier();
  void collective(unsigned mask, Perform* perform, void* operand, bool orders_memory);
  unsigned char* shared() { return shared_; }
  unsigned threads() const { return static_cast<unsigned>(threads_.size()); }
  size_t shared_bytes() const { return launch_.shared_bytes; }
  // True once in `times` calls; never without a seed.
  bool drawn(unsigned times) { return launch_.seed != 0 && random_() % times == 0; }
  unsigned draw(unsigned below) { return launch_.seed == 0 ? 0 : static_cast<unsigned>(random_() % below); }
  // Until wake(event), which may come for another reason than the one that the thread has.
  void wait_for(const void* event, const char* name);
  void wake(const void* event);
  void give_way();  // to another warp
  BlockState sm90;
  bool in_shared(const void* address, size_t bytes) const;
  unsigned seed() const { return launch_.seed; }

 private:
  static void thread_main();
  Thread* choose() const;
  void run_another(bool final = false);
  void stop_being_ready();
  void pass_barrier();
  void all_ready();
  void try_collective(Warp& warp, unsigned mask);
  void explain_deadlock();
  std::string where(const Thread& thread) const;

  const Launch& launch_;
  const uint3 index_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Warp*> order_;  // in which the warps run
  Fiber main_;
  unsigned char *shared_, *static_shared_;
  size_t static_bytes_;
  unsigned alive_, at_barrier_ = 0, at_grid_barrier_ = 0;
  unsigned predicates_ = 0, predicates_result_ = 0;
  unsigned barriers_ = 0, grid_barriers_ = 0;
  const char* barrier_file_ = nullptr;
  int barrier_line_ = 0;
  char start_, order_memory_[2];  // objects to release and acquire: when threads start, in __syncthreads
  std::minstd_rand random_;
  std::string failure_;
  std::vector<Thread*> waiting_;  // in wait_for
  Thread* questioned_ = nullptr;  // a waiting thread that is to say where it waits
  std::vector<void*> frames_;
};

// Those that run.
Block& this_block();
Thread& this_thread();

// Objects to release and acquire: all threads of a grid at its end, and at its barriers.
extern char grid_end, grid_order[2];

}  // namespace emu
