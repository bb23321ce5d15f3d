// A grid: which blocks run when, and the barrier between them.
#include <algorithm>
#include <memory>
#include <semaphore>
#include <stdexcept>
#include <thread>
#include <vector>

#include "block.h"
#include "device.h"
#include "report.h"
#include "statistics.h"

namespace emu {

Statistics statistics;
Device device;

namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("emulator: " + message);
}

void require_at_launch(bool condition, const std::string& message) {
  require(condition, condition ? "" : message + source_lines(call_stack()));
}

void check(const Block::Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const size_t threads = size_t{block.x} * block.y * block.z, blocks = size_t{grid.x} * grid.y * grid.z;
  require_at_launch(threads > 0 && threads <= 1024 && block.z <= 64,
                    "a block of " + std::to_string(threads) + " threads");
  require_at_launch(
      blocks > 0 && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535,
      "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
  require_at_launch(launch.shared_bytes <= kSharedBytesPerBlock, std::to_string(launch.shared_bytes) +
                                                                     " bytes of shared memory, a block has at most " +
                                                                     std::to_string(kSharedBytesPerBlock));
  if (!launch.cooperative) return;
  const auto resident = static_cast<size_t>(resident_blocks(static_cast<int>(threads), launch.shared_bytes));
  require_at_launch(blocks <= resident, "a cooperative grid of " + std::to_string(blocks) + " blocks, of which only " +
                                            std::to_string(resident) + " can be resident");
}

// A block on an OS thread of its own, so that its static __shared__ variables are its own. Only one OS thread runs at a
// time, this one or that of a block, so that a seed determines the schedule.
class Resident {
 public:
  Resident(const Block::Launch& launch, uint3 index) : thread_([this, &launch, index] { main(launch, index); }) {}
  ~Resident() {
    abandoned_ = true;
    if (!done_) go_.release();
    thread_.join();
  }
  Resident(const Resident&) = delete;

  void run() {
    go_.release();
    back_.acquire();
  }
  bool done() const { return done_; }
  const std::string& failure() const { return failure_; }

 private:
  void main(const Block::Launch& launch, uint3 index) {
    const Unseen unseen;  // of this OS thread, not of the block's CUDA threads, which are fibers
    go_.acquire();
    if (!abandoned_) {
      Block block(launch, index);
      for (block.run(); block.at_grid_barrier(); block.run()) {
        back_.release();
        go_.acquire();
        if (abandoned_) return;
        block.pass_grid_barrier();
      }
      failure_ = block.failure();
    }
    done_ = true;
    back_.release();
  }

  std::binary_semaphore go_{0}, back_{0};
  bool abandoned_ = false, done_ = false;
  std::string failure_;
  std::thread thread_;
};

// Runs all of them, from one grid barrier to the next.
void run_together(std::vector<std::unique_ptr<Resident>>& residents, std::minstd_rand& random, bool shuffled) {
  for (size_t done = 0; done == 0;) {
    if (shuffled) std::shuffle(residents.begin(), residents.end(), random);
    for (auto& resident : residents) {
      resident->run();
      require(resident->failure().empty(), resident->failure());
      done += resident->done();
    }
    require_at_launch(done == 0 || done == residents.size(),
                      "grid.sync() is reached by " + std::to_string(residents.size() - done) + " of " +
                          std::to_string(residents.size()) + " blocks, the others returned");
  }
}

}  // namespace

void launch(void (*body)(const void*), const void* closure, dim3 grid, dim3 block, size_t shared_bytes,
            bool cooperative) {
  statistics.launches += 1;
  const unsigned seed = device.seed == 0 ? 0 : device.seed + 1000 * device.launches_since_seeded++;
  const Block::Launch launch{body, closure, grid, block, shared_bytes, cooperative, seed};
  check(launch);
  if (device.resident_blocks == 0) return;
  std::minstd_rand random(seed + 1);
  std::vector<uint3> indices;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) indices.push_back({x, y, z});
  if (seed != 0) std::shuffle(indices.begin(), indices.end(), random);
  statistics.blocks += static_cast<long>(indices.size());

  begin_launch();
  std::vector<std::unique_ptr<Resident>> residents;
  for (const uint3 index : indices) {
    residents.push_back(std::make_unique<Resident>(launch, index));
    if (cooperative) continue;
    run_together(residents, random, false);
    residents.clear();
  }
  if (cooperative) run_together(residents, random, seed != 0);
  residents.clear();
  acquire(&grid_end);
}

int resident_blocks(int threads, size_t shared_bytes) {
  return threads > 1024 || shared_bytes > kSharedBytesPerBlock ? 0 : device.resident_blocks;
}

bool cooperates() {
  statistics.refusals += !device.cooperative;
  device.has_refused = !device.cooperative;
  return device.cooperative;
}

bool has_refused() { return device.has_refused; }

}  // namespace emu

#define EXPORTED extern "C" __attribute__((visibility("default")))

// A seed of 0 runs warps, lanes and blocks in order; any other draws an order of its own at every barrier. Where no
// block can be resident kernels do not run: what is left is the host's part of a call.
EXPORTED void emulator_configure(unsigned seed, int resident_blocks, bool cooperative) {
  emu::device = {seed, 0, resident_blocks, cooperative};
}

EXPORTED void emulator_statistics(emu::Statistics* statistics) { *statistics = emu::statistics; }
