// Fiber scheduler of the CUDA emulation. Compile WITHOUT -fsanitize (the emulator's own state
// is shared between fibers); define EMU_ASAN or EMU_TSAN when the kernels are sanitized.
//   EMU_SEED=n  n>0: random warp priorities (redrawn at every barrier) and lane order
//   EMU_THREADS OS threads for the blocks of a non-cooperative grid (default 1)
#include "emulator.h"
#include <sys/mman.h>
#include <atomic>
#include <barrier>
#include <cstdarg>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMU_TSAN
#include <sanitizer/tsan_interface.h>
#define TSAN(x) x
#else
#define TSAN(x) (void)0
#endif

extern "C" void emu_switch(void** save_sp, void* load_sp);
#ifndef __x86_64__
#error "only x86-64 so far (a ucontext version is 15 lines, but about 10 times slower)"
#endif
asm(R"(.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

namespace emu {
namespace {
constexpr size_t kStack = 256 << 10;

struct Context { void* sp = nullptr; void* fake = nullptr; const void* bottom = nullptr; size_t size = 0; void* tsan = nullptr; };
struct Fiber {
  Context ctx;
  uint3 tid;
  unsigned lane;
  struct Warp* warp;
  AsyncQueue async;
  const char* file = nullptr;   // where it waits
  int line = 0;
};
struct Warp {
  unsigned alive = 0, ready = 0, waiting = 0, rot = 0, key = 0;
  Fiber* fiber[32] = {};
  void* op[32] = {};
  WarpFn fn[32] = {};
  unsigned mask[32] = {};
  unsigned phase = 0;
  char sync[2];                 // TSan sync objects of __syncwarp, by parity
};
struct Block {
  const std::function<void()>* body;
  dim3 grid, dim;
  uint3 idx;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warp*> order;
  Context main;
  unsigned alive = 0, at_barrier = 0, at_grid = 0, phase = 0, grid_phase = 0, pred = 0, pred_out = 0;
  char sync[2];                 // TSan sync objects of __syncthreads, by parity
  unsigned char* smem = nullptr;
  size_t smem_bytes = 0;
  std::mt19937 rng;
  bool random = false;
  std::string error;
};
thread_local Block* B;
thread_local Fiber* me;
[[maybe_unused]] char g_start, g_end, g_grid[2], g_fence;   // TSan sync objects

struct Stacks {                 // per OS thread, reused from block to block
  std::vector<char*> s;
  char* get(size_t i) {
    while (s.size() <= i)
      s.push_back(static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
    return s[i];
  }
  void clear() { for (char* p : s) munmap(p, kStack); s.clear(); }
  ~Stacks() { clear(); }
};
thread_local Stacks stacks;

void switch_to(Context& from, Context& to, bool dying = false) {
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(dying ? nullptr : &from.fake, to.bottom, to.size);
#endif
  TSAN(__tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync));
  emu_switch(&from.sp, to.sp);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
  (void)dying;
}

Fiber* pick() {
  for (Warp* w : B->order)
    if (w->ready) {
      unsigned r = w->ready, k = w->rot;
      unsigned rotated = k ? (r >> k | r << (32 - k)) : r;
      return w->fiber[(__builtin_ctz(rotated) + k) % 32];
    }
  return nullptr;
}
void next(bool dying = false) {   // leave the running fiber for the next ready one
  Fiber *from = me, *to = pick();
  if (to == from && !dying) return;
  me = to;
  if (to) threadIdx = to->tid;
  switch_to(from->ctx, to ? to->ctx : B->main, dying);
}
void shuffle() {
  if (!B->random) return;
  for (Warp* w : B->order) w->rot = B->rng() % 32;
  std::shuffle(B->order.begin(), B->order.end(), B->rng);
}
void release_all() {
  for (Warp& w : B->warps) w.ready = w.alive;
  shuffle();
}
void release_barrier() {
  B->at_barrier = 0;
  B->pred_out = B->pred;
  B->pred = 0;
  B->phase++;
  release_all();
}
void try_collective(Warp& w, unsigned mask) {
  unsigned want = mask & w.alive;
  if (!want || (w.waiting & want) != want) return;
  const int first = __builtin_ctz(want);
  void* op[32] = {};
  for (int l = 0; l < 32; l++)
    if (want >> l & 1) {
      if (w.fn[l] != w.fn[first] || w.mask[l] != mask)
        fail("divergent warp: lanes %d and %d wait in different warp-wide operations", first, l);
      op[l] = w.op[l];
    }
  w.fn[first](op, want);
  w.waiting &= ~want;
  w.ready |= want;
  w.phase++;
  if (B->random) w.rot = (w.rot + 7) % 32;
}
void fiber_main() {
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  TSAN(__tsan_acquire(&g_start));
  (*B->body)();
  TSAN(__tsan_release(&g_end));
  Warp& w = *me->warp;
  w.alive &= ~(1u << me->lane);
  w.ready &= w.alive;
  B->alive--;
  for (int l = 0; l < 32; l++)
    if (w.waiting >> l & 1) try_collective(w, w.mask[l]);
  if (B->alive && B->at_barrier == B->alive) release_barrier();
  next(true);
  __builtin_unreachable();
}

void setup(Block& b, size_t block_id, unsigned seed) {
  const unsigned n = b.dim.x * b.dim.y * b.dim.z;
  b.idx = {unsigned(block_id % b.grid.x), unsigned(block_id / b.grid.x % b.grid.y), unsigned(block_id / b.grid.x / b.grid.y)};
  b.fibers.resize(n);
  b.warps.resize((n + 31) / 32);
  b.alive = n;
  b.random = seed != 0;
  b.rng.seed(seed * 7919u + unsigned(block_id));
  for (Warp& w : b.warps) b.order.push_back(&w);
#ifdef EMU_TSAN
  stacks.clear();               // fresh mappings: no stale shadow from another block's fibers
  b.main.tsan = __tsan_get_current_fiber();
#endif
#ifdef EMU_ASAN
  static thread_local char* base; static thread_local size_t size;
  if (!base) {
    pthread_attr_t a; void* p;
    pthread_getattr_np(pthread_self(), &a); pthread_attr_getstack(&a, &p, &size); pthread_attr_destroy(&a);
    base = static_cast<char*>(p);
  }
  b.main.bottom = base; b.main.size = size;
#endif
  b.smem = static_cast<unsigned char*>(std::aligned_alloc(128, (b.smem_bytes + 127) / 128 * 128));
#ifdef EMU_ASAN
  __asan_poison_memory_region(b.smem + b.smem_bytes, (b.smem_bytes + 127) / 128 * 128 - b.smem_bytes);
#endif
  memset(b.smem, 0xFF, b.smem_bytes);   // NaN in bf16, f16, f32
  for (unsigned i = 0; i < n; i++) {
    Fiber& f = b.fibers[i];
    f.tid = {i % b.dim.x, i / b.dim.x % b.dim.y, i / b.dim.x / b.dim.y};
    f.lane = i % 32;
    f.warp = &b.warps[i / 32];
    f.warp->fiber[f.lane] = &f;
    f.warp->alive |= 1u << f.lane;
    char* base = stacks.get(i);
    f.ctx.bottom = base;
    f.ctx.size = kStack;
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(base, kStack);
#endif
    TSAN(f.ctx.tsan = __tsan_create_fiber(0));
    void** top = reinterpret_cast<void**>(base + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int k = 0; k < 6; k++) *--top = nullptr;
    f.ctx.sp = top;
  }
  B = &b;
  release_all();
}
// Runs until every thread is done (false) or waits in grid.sync (true).
bool run(Block& b) {
  B = &b;
  blockIdx = b.idx; blockDim = b.dim; gridDim = b.grid;
  me = pick();
  if (me) { threadIdx = me->tid; switch_to(b.main, me->ctx); }
  me = nullptr;
  if (!b.error.empty()) TSAN(__tsan_acquire(&g_end));
  if (b.error.empty() && b.alive && b.at_grid != b.alive) {
    b.error = "deadlock in block " + std::to_string(b.idx.x) + "," + std::to_string(b.idx.y) + ": ";
    for (Fiber& f : b.fibers)
      if (f.warp->alive >> f.lane & 1) {
        const bool warp = f.warp->waiting >> f.lane & 1;
        b.error += "thread " + std::to_string(f.tid.x) + (warp ? " in a warp-wide operation" : " at " + std::string(f.file) + ":" + std::to_string(f.line));
        b.error += ", " + std::to_string(b.alive) + " of " + std::to_string(b.fibers.size()) + " threads left";
        break;
      }
  }
  return b.error.empty() && b.alive;
}
void teardown(Block& b) {
#ifdef EMU_ASAN
  __asan_unpoison_memory_region(b.smem, (b.smem_bytes + 127) / 128 * 128);
#endif
  std::free(b.smem);
}
unsigned env(const char* name, unsigned dflt) { const char* s = getenv(name); return s ? unsigned(atoi(s)) : dflt; }
}  // namespace

void launch(const std::function<void()>& body, dim3 grid, dim3 block, size_t smem, bool coop) {
  static std::atomic<unsigned> launches{0};
  const size_t nb = size_t(grid.x) * grid.y * grid.z;
  const unsigned base = env("EMU_SEED", 0), seed = base ? base + 1000 * launches++ : 0;
  std::mutex mu;
  std::string error;
  std::vector<std::unique_ptr<Block>> kept;
  auto make = [&](size_t id) {
    auto b = std::make_unique<Block>();
    b->body = &body; b->grid = grid; b->dim = block; b->smem_bytes = smem;
    setup(*b, id, seed);
    return b;
  };
  auto finish = [&](std::unique_ptr<Block> b) {
    std::lock_guard<std::mutex> g(mu);
    B = nullptr;
    if (!b->error.empty() && error.empty()) error = b->error;
#ifdef EMU_TSAN                 // freed only after acquiring g_end, which would order the blocks
    for (Fiber& f : b->fibers) __tsan_destroy_fiber(f.ctx.tsan);
    kept.push_back(std::move(b));
#else
    teardown(*b);
#endif
  };
  TSAN(__tsan_release(&g_start));
  std::vector<std::thread> ts;
  std::vector<size_t> ids(nb);
  std::iota(ids.begin(), ids.end(), size_t(0));
  if (seed) std::shuffle(ids.begin(), ids.end(), std::mt19937(seed));
  if (coop) {                   // one OS thread per block: `static thread_local` is per block
    std::atomic<int> waiting{0}, finished{0};
    bool broken = false;
    auto all_here = [&]() noexcept { broken = waiting && finished; waiting = 0; };
    std::barrier bar{std::ptrdiff_t(nb), all_here};
    for (size_t id : ids)
      ts.emplace_back([&, id] {
        auto b = make(id);
        while (run(*b)) {
          waiting++;
          bar.arrive_and_wait();
          if (broken) { b->error = "grid.sync is not reached by all blocks"; break; }
          b->at_grid = 0;
          b->grid_phase++;
          release_all();
        }
        finished++;
        bar.arrive_and_drop();
        finish(std::move(b));
      });
    for (auto& t : ts) t.join();
  } else {
    std::atomic<size_t> nextb{0};
    std::atomic<bool> failed{false};
    auto work = [&] {
      for (size_t i; (i = nextb++) < nb && !failed;) {
        auto one = [&] {
          auto b = make(ids[i]);
          if (run(*b)) b->error = "grid.sync in a kernel that was not launched cooperatively";
          if (!b->error.empty()) failed = true;
          finish(std::move(b));
        };
#ifdef EMU_TSAN                 // static __shared__ must not be shared with the next block
        std::thread(one).join();
#else
        one();
#endif
      }
    };
    for (unsigned i = 1; i < env("EMU_THREADS", 1); i++) ts.emplace_back(work);
    work();
    for (auto& t : ts) t.join();
  }
  TSAN(__tsan_acquire(&g_end));
  for (auto& b : kept) teardown(*b);
  if (!error.empty()) throw std::runtime_error("cuda_emu: " + error);
}

void fail(const char* fmt, ...) {
  char msg[512];
  va_list ap; va_start(ap, fmt); vsnprintf(msg, sizeof msg, fmt, ap); va_end(ap);
  Fiber* f = me;
  static thread_local char where[128];
  snprintf(where, sizeof where, " (block %u,%u,%u thread %u,%u,%u)", B->idx.x, B->idx.y, B->idx.z, f->tid.x, f->tid.y, f->tid.z);
  TSAN(__tsan_acquire(&g_end));
  B->error = std::string(msg) + where;
  TSAN(__tsan_release(&g_end));
  for (Warp& w : B->warps) w.ready = 0;   // nobody runs on; the fibers are abandoned
  me = nullptr;
  switch_to(f->ctx, B->main);
  abort();
}
unsigned char* dyn_smem(size_t* bytes) { if (bytes) *bytes = B->smem_bytes; return B->smem; }
unsigned lane() { return me->lane; }
AsyncQueue& async_queue() { return me->async; }

int barrier(int pred, const char* file, int line) {
  Block& b = *B;
  [[maybe_unused]] char* sync = &b.sync[b.phase & 1];
  TSAN(__tsan_release(sync));
  me->file = file; me->line = line;
  b.pred += pred;
  b.at_barrier++;
  me->warp->ready &= ~(1u << me->lane);
  if (b.at_barrier == b.alive) release_barrier();
  next();
  TSAN(__tsan_acquire(sync));
  return int(b.pred_out);
}
void grid_sync(const char* file, int line) {
  [[maybe_unused]] char* sync = &g_grid[B->grid_phase & 1];
  TSAN(__tsan_release(sync));
  me->file = file; me->line = line;
  B->at_grid++;
  me->warp->ready &= ~(1u << me->lane);
  next();
  TSAN(__tsan_acquire(sync));
}
void fence() { TSAN(__tsan_release(&g_fence)); TSAN(__tsan_acquire(&g_fence)); }

void collective(unsigned mask, WarpFn fn, void* op, bool orders_memory) {
  Warp& w = *me->warp;
  const unsigned l = me->lane;
  if (!(mask >> l & 1)) fail("warp-wide operation: the calling lane %u is not in mask %08x", l, mask);
  [[maybe_unused]] char* sync = &w.sync[w.phase & 1];
  if (orders_memory) TSAN(__tsan_release(sync));
  w.op[l] = op; w.fn[l] = fn; w.mask[l] = mask;
  w.waiting |= 1u << l;
  w.ready &= ~(1u << l);
  try_collective(w, mask);
  if (!(w.ready >> l & 1)) next();
  if (orders_memory) TSAN(__tsan_acquire(sync));
}
static std::atomic<long> bank_phases{0}, bank_cycles{0};
extern "C" double emu_bank_ratio() { const double r = double(bank_cycles) / std::max(1L, bank_phases.load()); bank_phases = bank_cycles = 0; return r; }
static void copy(void* to, const void* from, size_t n) {   // not memcpy: sanitizers intercept it
  for (size_t i = 0; i < n; i++)
    static_cast<volatile unsigned char*>(to)[i] = from ? static_cast<const volatile unsigned char*>(from)[i] : 0xFF;
}
void shfl_fn(void** op, unsigned) {
  for (int l = 0; l < 32; l++)
    if (auto* s = static_cast<Shfl*>(op[l])) {
      auto* from = static_cast<Shfl*>(op[s->src]);
      copy(s->out, from ? from->in : nullptr, s->size);   // from an absent lane: undefined
    }
}
void vote_fn(void** op, unsigned mask) {
  unsigned r = 0;
  for (int l = 0; l < 32; l++) if (op[l] && static_cast<Vote*>(op[l])->pred) r |= 1u << l;
  for (int l = 0; l < 32; l++) if (op[l]) static_cast<Vote*>(op[l])->out = r & mask;
}
static void whole_warp(unsigned mask, const char* what) { if (mask != ~0u) fail("%s needs all 32 lanes", what); }
void rows_fn(void** op, unsigned mask) {
  whole_warp(mask, "ldmatrix");
  for (int i = 0; i < 4; i++) {   // bank statistics: cycles of one 8-row phase = most distinct rows in one 16-byte bank group
    const unsigned char* seen[8][8]; int n[8] = {}, worst = 0;
    for (int l = 0; l < 8; l++) {
      auto* p = static_cast<const unsigned char*>(static_cast<Rows*>(op[8 * i + l])->row);
      const int g = reinterpret_cast<uintptr_t>(p) / 16 % 8;
      bool dup = false;
      for (int k = 0; k < n[g]; k++) dup |= seen[g][k] == p;
      if (!dup) seen[g][n[g]++] = p;
      worst = std::max(worst, n[g]);
    }
    bank_phases++; bank_cycles += worst;
  }
  for (int l = 0; l < 32; l++) {
    auto* x = static_cast<Rows*>(op[l]);
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 2; j++)
        x->rows[i][j] = static_cast<const unsigned char*>(static_cast<Rows*>(op[8 * i + (x->trans ? l % 4 * 2 + j : l / 4)])->row);
  }
}
static float to_float(MmaType t, uint32_t reg, int half) {
  uint32_t u;
  if (t == MmaType::tf32) u = reg & 0xFFFFE000u;   // the hardware ignores the low 13 bits
  else if (t == MmaType::bf16) u = (reg >> 16 * half) << 16;
  else { __half_raw h; h.x = uint16_t(reg >> 16 * half); return __half2float(__half(h)); }
  float f; memcpy(&f, &u, 4); return f;
}
// d += a * b; products exact, sums in fp32 in order of k (the hardware sums differently).
__attribute__((target_clones("avx2", "default"), optimize("O3")))
static void mma_tile(const float (*A)[16], const float (*Bm)[8], float (*D)[8], int K) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < 8; n++) D[m][n] += A[m][k] * Bm[k][n];
}
template <MmaType T> void mma_fn(void** op, unsigned mask) {
  whole_warp(mask, "mma");
  constexpr int E = T == MmaType::tf32 ? 1 : 2;   // elements per register; K = 8 * E
  float A[16][16], Bm[16][8], D[16][8];
  for (int l = 0; l < 32; l++) {
    auto* m = static_cast<Mma*>(op[l]);
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; r++)
      for (int e = 0; e < E; e++) A[g + r % 2 * 8][r / 2 * 4 * E + t * E + e] = to_float(T, m->a[r], e);
    for (int r = 0; r < 2; r++)
      for (int e = 0; e < E; e++) Bm[r * 4 * E + t * E + e][g] = to_float(T, m->b[r], e);
    for (int r = 0; r < 4; r++) D[g + r / 2 * 8][t * 2 + r % 2] = m->d[r];
  }
  mma_tile(A, Bm, D, 8 * E);
  for (int l = 0; l < 32; l++)
    for (int r = 0; r < 4; r++) static_cast<Mma*>(op[l])->d[r] = D[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
}
template void mma_fn<MmaType::bf16>(void**, unsigned);
template void mma_fn<MmaType::f16>(void**, unsigned);
template void mma_fn<MmaType::tf32>(void**, unsigned);
}  // namespace emu
