// mbarriers, named barriers and the registers of a warp: what threads of a block wait for.
#include <algorithm>

#include "block.h"

namespace emu {
namespace {

constexpr unsigned kRegisters = 64 << 10;  // of a multiprocessor

Mbarrier& mbarrier(uint32_t address) {
  auto& all = this_block().sm90.mbarriers;
  const auto found = all.find(address);
  if (found == all.end()) fail("mbarrier: there was no mbarrier.init of shared memory %u", address);
  return found->second;
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase += 1;
  barrier.pending = barrier.count;
  this_block().wake(&barrier);
}

// All lanes of the warp come, the first acts. A kernel starts with what __launch_bounds__ leaves to each thread.
bool first_of_setmaxnreg() {
  const auto check = [](void* const*, unsigned lanes) { need_the_whole_warp(lanes, "setmaxnreg"); };
  collective(~0u, check, nullptr);
  unsigned& own = this_thread().warp->sm90.registers;
  if (own == 0) own = std::min(kRegisters / this_block().threads() / 8 * 8, 248u);
  return lane() == 0;
}

}  // namespace

void mbarrier_init(uint32_t address, uint32_t count) {
  shared_pointer(address, 8);
  if (count == 0 || count >= 1u << 20) fail("mbarrier.init: a count of %u", count);
  Mbarrier& barrier = this_block().sm90.mbarriers[address];
  barrier = Mbarrier();
  barrier.count = barrier.pending = count;
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : this_block().sm90.mbarriers) barrier.fenced = true;
}

void mbarrier_arrive(uint32_t address) {
  Mbarrier& barrier = mbarrier(address);
  if (barrier.pending == 0) fail("mbarrier: more arrivals than its count of %u", barrier.count);
  barrier.pending -= 1;
  end_phase_if_complete(barrier);
  // Who waited may come before what this thread does next.
  if (barrier.pending == barrier.count && this_block().drawn(2)) this_block().give_way();
}

void mbarrier_expect(uint32_t address, uint32_t bytes) { mbarrier(address).bytes += bytes; }

void mbarrier_complete(uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = mbarrier(address);
  barrier.bytes -= bytes;
  if (barrier.pending == 0 && barrier.bytes < 0)
    fail("mbarrier: %d bytes more than were expected", static_cast<int>(-barrier.bytes));
  end_phase_if_complete(barrier);
}

// A wait names the parity of a phase alone, and for one that is two phases behind it means another phase.
bool mbarrier_done(uint32_t address, uint32_t parity) {
  Mbarrier& barrier = mbarrier(address);
  if (parity > 1) fail("mbarrier: a parity of %u", parity);
  const int start = parity == 0 ? 0 : -1;  // the phase before the first counts as over
  int& wanted = barrier.waited.try_emplace(this_thread().number, start).first->second;
  wanted += (wanted ^ static_cast<int>(parity)) & 1;
  if (barrier.phase > wanted + 1) fail("mbarrier: waits for phase %d, but phase %d is over", wanted, barrier.phase - 1);
  return (barrier.phase ^ parity) & 1;
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  while (!mbarrier_done(address, parity)) this_block().wait_for(&mbarrier(address), "an mbarrier");
}

void named_barrier(uint32_t id, uint32_t threads, bool wait) {
  if (id == 0 || id >= 16) fail("a barrier with the number %u; 0 is that of __syncthreads", id);
  if (threads == 0 || threads % 32) fail("barrier %u: %u threads, no multiple of a warp", id, threads);
  NamedBarrier& barrier = this_block().sm90.named_barriers[id];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) fail("barrier %u: of %u threads here, of %u elsewhere", id, threads, barrier.threads);
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.generation += 1;
    this_block().wake(&barrier);
  }
  while (wait && barrier.generation == generation) this_block().wait_for(&barrier, "a named barrier");
}

void setmaxnreg_dec(uint32_t registers) {
  if (!first_of_setmaxnreg()) return;
  unsigned& own = this_thread().warp->sm90.registers;
  if (registers % 8 || registers < 24 || registers > own) fail("setmaxnreg.dec to %u of %u registers", registers, own);
  this_block().sm90.free_registers += (own - registers) * 32;
  own = registers;
  this_block().wake(&this_block().sm90.free_registers);
}

void setmaxnreg_inc(uint32_t registers) {
  if (!first_of_setmaxnreg()) return;
  unsigned &own = this_thread().warp->sm90.registers, &free = this_block().sm90.free_registers;
  if (registers % 8 || registers > 256 || registers < own) fail("setmaxnreg.inc to %u of %u registers", registers, own);
  while (free < (registers - own) * 32) this_block().wait_for(&free, "registers");
  free -= (registers - own) * 32;
  own = registers;
}

// The first lane of the mask. PTX leaves open which it is; CUTLASS counts on it.
uint32_t elected(uint32_t mask) {
  collective(mask, [](void* const*, unsigned) {}, nullptr);
  return static_cast<uint32_t>(__builtin_ctz(mask));
}

}  // namespace emu
