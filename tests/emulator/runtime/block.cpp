#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "memory_map.h"
#include "report.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

char grid_end, grid_order[2];

namespace {
Block* block;  // that runs
Thread* self;  // of it, that runs
unsigned bit(unsigned lane) { return 1u << lane; }
}  // namespace

// ---- threads ----

Block::Block(const Launch& launch, uint3 index)
    : launch_(launch), index_(index), static_shared_(static_shared(&static_bytes_)) {
  const dim3 shape = launch.block;
  alive_ = shape.x * shape.y * shape.z;
  random_.seed(launch.seed * 7919u + index.x + 31 * index.y + 1009 * index.z + 1);
  shared_ = map_shared(launch.shared_bytes);
  poison(shared_, launch.shared_bytes);
  poison(static_shared_, static_bytes_);
  adopt_thread(main_);
  threads_.resize(alive_);
  warps_.resize((alive_ + 31) / 32);
  for (Warp& warp : warps_) order_.push_back(&warp);
  for (unsigned i = 0; i < alive_; ++i) {
    Thread& thread = threads_[i];
    thread.index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    thread.number = i;
    thread.lane = i % 32;
    thread.warp = &warps_[i / 32];
    thread.warp->threads[thread.lane] = &thread;
    thread.warp->alive |= bit(thread.lane);
    create(thread.fiber, thread_main);
  }
  release(&start_);
  all_ready();
}

Block::~Block() {
  for (Thread& thread : threads_) destroy(thread.fiber);
  unmap_shared(shared_, launch_.shared_bytes);
}

void Block::thread_main() {
  entered();
  acquire(&block->start_);
  block->launch_.body(block->launch_.closure);
  end_thread(block->alive_ == 1);
  release(&grid_end);
  Warp& warp = *self->warp;
  warp.alive &= ~bit(self->lane);
  warp.ready &= warp.alive;
  block->alive_ -= 1;
  // Those who wait do not wait for a thread that is gone.
  for (unsigned lane = 0; lane < 32; ++lane)
    if (warp.collecting & bit(lane)) block->try_collective(warp, warp.threads[lane]->mask);
  if (block->alive_ > 0 && block->at_barrier_ == block->alive_) block->pass_barrier();
  block->run_another(true);
  std::abort();  // a final switch does not return
}

void Block::run() {
  block = this;
  blockIdx = index_;
  blockDim = launch_.block;
  gridDim = launch_.grid;
  run_another();
  if (failure_.empty() && alive_ > 0 && at_grid_barrier_ != alive_) explain_deadlock();
}

// ---- who runs ----

Thread* Block::choose() const {
  for (const Warp* warp : order_)
    if (warp->ready) {
      const unsigned rotated =
          warp->ready >> warp->first | static_cast<unsigned>(uint64_t{warp->ready} << (32 - warp->first));
      return warp->threads[(__builtin_ctz(rotated) + warp->first) % 32];
    }
  return nullptr;
}

// Leaves the running thread, or the block's own stack, for a thread that is ready; where there is none, for that stack.
void Block::run_another(bool final) {
  if (self && !sm90.loads.empty() && drawn(64)) deliver_load();
  Thread *from = self, *to = choose();
  while (to == nullptr && self && deliver_load()) to = choose();
  if (to == from && to != nullptr) return;
  self = to;
  if (to) threadIdx = to->index;
  switch_to(from ? from->fiber : main_, to ? to->fiber : main_, final);
  if (questioned_ && questioned_ == self) {
    frames_ = call_stack();
    self = nullptr;
    switch_to(questioned_->fiber, main_);
  }
}

void Block::stop_being_ready() { self->warp->ready &= ~bit(self->lane); }

void Block::all_ready() {
  for (Warp& warp : warps_) warp.ready = warp.alive;
  if (launch_.seed == 0) return;
  std::shuffle(order_.begin(), order_.end(), random_);
  for (Warp& warp : warps_) warp.first = random_() % 32;
}

void Block::wait_for(const void* event, const char* name) {
  self->event = event;
  self->event_name = name;
  waiting_.push_back(self);
  stop_being_ready();
  run_another();
  self->event = nullptr;
}

void Block::wake(const void* event) {
  const auto is_due = [=](const Thread* thread) { return thread->event == event; };
  for (Thread* thread : waiting_)
    if (is_due(thread)) thread->warp->ready |= bit(thread->lane);
  waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), is_due), waiting_.end());
}

void Block::give_way() {
  order_.erase(std::find(order_.begin(), order_.end(), self->warp));
  order_.push_back(self->warp);
  run_another();
}

// ---- barriers ----

int Block::barrier(bool predicate, const char* file, int line) {
  if (at_barrier_ == 0) {
    barrier_file_ = file;
    barrier_line_ = line;
  } else if (line != barrier_line_ || file != barrier_file_) {
    fail("__syncthreads: other threads of the block wait at another one, " + std::string(barrier_file_) + ":" +
         std::to_string(barrier_line_));
  }
  char* order = &order_memory_[barriers_ % 2];
  release(order);
  predicates_ += predicate;
  at_barrier_ += 1;
  stop_being_ready();
  if (at_barrier_ == alive_) pass_barrier();
  run_another();
  acquire(order);
  return static_cast<int>(predicates_result_);
}

void Block::pass_barrier() {
  predicates_result_ = predicates_;
  predicates_ = at_barrier_ = 0;
  barriers_ += 1;
  all_ready();
}

void Block::grid_barrier() {
  if (!launch_.cooperative) fail("grid.sync() in a kernel that was not launched cooperatively");
  char* order = &grid_order[grid_barriers_ % 2];
  release(order);
  at_grid_barrier_ += 1;
  stop_being_ready();
  run_another();
  acquire(order);
}

void Block::pass_grid_barrier() {
  at_grid_barrier_ = 0;
  grid_barriers_ += 1;
  all_ready();
}

// ---- warps ----

void Block::collective(unsigned mask, Perform* perform, void* operand, bool orders_memory) {
  Warp& warp = *self->warp;
  if (!(mask & bit(self->lane))) fail("lane " + std::to_string(self->lane) + " is not in its own mask of lanes");
  char* order = &warp.order[warp.collectives % 2];
  if (orders_memory) release(order);
  self->perform = perform;
  self->mask = mask;
  self->operand = operand;
  warp.collecting |= bit(self->lane);
  stop_being_ready();
  try_collective(warp, mask);
  if (!(warp.ready & bit(self->lane))) run_another();
  if (orders_memory) acquire(order);
}

void Block::try_collective(Warp& warp, unsigned mask) {
  const unsigned lanes = mask & warp.alive;
  if (lanes == 0 || (warp.collecting & lanes) != lanes) return;
  void* operands[32] = {};
  const Thread& first = *warp.threads[__builtin_ctz(lanes)];
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes & bit(lane))) continue;
    const Thread& thread = *warp.threads[lane];
    if (thread.perform != first.perform || thread.mask != mask)
      fail("divergent warp: lanes " + std::to_string(first.lane) + " and " + std::to_string(lane) +
           " wait in different operations of the warp, or with different masks");
    operands[lane] = thread.operand;
  }
  first.perform(operands, lanes);
  warp.collecting &= ~lanes;
  warp.ready |= lanes;
  warp.collectives += 1;
  if (launch_.seed != 0) warp.first = (warp.first + 7) % 32;
}

// ---- mistakes ----

void Block::fail(const std::string& message) {
  failure_ = message + where(*self);
  frames_ = call_stack();
  failure_ += source_lines(frames_);
  for (Warp& warp : warps_) warp.ready = 0;  // the threads are abandoned where they stand
  Thread* failed = self;
  self = nullptr;
  switch_to(failed->fiber, main_);
  std::abort();
}

void Block::explain_deadlock() {
  failure_ = "deadlock: of " + std::to_string(threads_.size()) + " threads " + std::to_string(alive_) + " wait, " +
             std::to_string(at_barrier_) + " of them in __syncthreads and " + std::to_string(at_grid_barrier_) +
             " in grid.sync()";
  std::map<std::vector<void*>, std::string> known;  // most threads stand where others do
  std::string seen;
  for (Thread& thread : threads_) {
    if (!(thread.warp->alive & bit(thread.lane))) continue;
    self = questioned_ = &thread;
    switch_to(main_, thread.fiber);
    questioned_ = nullptr;
    const auto [at, is_new] = known.try_emplace(frames_);
    if (is_new) at->second = source_lines(frames_);
    const std::string& lines = at->second;
    if (seen.find(lines) == std::string::npos)
      failure_ +=
          "\nthread" + where(thread) + (thread.event ? std::string(" waits for ") + thread.event_name : "") + lines;
    seen += lines;
  }
}

std::string Block::where(const Thread& thread) const {
  char text[128];
  std::snprintf(text, sizeof text, " (block %u,%u,%u thread %u,%u,%u)", index_.x, index_.y, index_.z, thread.index.x,
                thread.index.y, thread.index.z);
  return text;
}

bool Block::in_shared(const void* address, size_t bytes) const {
  const auto* first = static_cast<const unsigned char*>(address);
  const auto inside = [=](const unsigned char* start, size_t size) {
    return first >= start && first + bytes <= start + size;
  };
  return inside(shared_, launch_.shared_bytes) || inside(static_shared_, static_bytes_);
}

// ---- what kernels call ----

void fail(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  block->fail(message);
}

Block& this_block() { return *block; }
Thread& this_thread() { return *self; }
unsigned lane() { return self->lane; }
unsigned char* dynamic_shared() { return block->shared(); }
int barrier(bool predicate, const char* file, int line) { return block->barrier(predicate, file, line); }
void grid_barrier() { block->grid_barrier(); }

void collective(unsigned mask, Perform* perform, void* operand, bool orders_memory) {
  block->collective(mask, perform, operand, orders_memory);
}

void check_shared(const void* address, size_t bytes, const char* instruction) {
  if (!block->in_shared(address, bytes)) fail("%s: %p is not in shared memory", instruction, address);
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("%s: %p is not aligned to %zu bytes", instruction, address, bytes);
}

// Stronger than on a GPU: whatever any thread did before a fence happens before what follows any later fence.
void fence() {
  static char order;
  release(&order);
  acquire(&order);
}

void enqueue(const AsyncCopy& copy) {
  const Unseen unseen;
  self->copies.push_back(copy);
  self->copies.back().group = self->groups;
}

bool dequeue(AsyncCopy& copy, unsigned pending_groups) {
  const Unseen unseen;
  auto& copies = self->copies;
  if (copies.empty() || copies.front().group + pending_groups >= self->groups) return false;
  copy = copies.front();
  copies.erase(copies.begin());
  return true;
}

void cp_async_commit() { self->groups += 1; }

}  // namespace emu
