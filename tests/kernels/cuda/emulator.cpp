#undef _FORTIFY_SOURCE  // its longjmp reports a jump to another stack as an error
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <random>

namespace emulator {
namespace {

constexpr size_t kStack = 192 * 1024;

struct Barrier {  // the state of an mbarrier in shared memory
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  int phase = 0;

  void settle() {
    if (pending == 0 && bytes == 0) ++phase, pending = expected;
  }
};

struct Named {
  int arrived = 0, generation = 0;
};

struct Warp {
  uint32_t values[32];
  int arrived = 0, left = 0, generation = 0;
};

struct Block {
  std::vector<uint8_t> memory;
  uint8_t* base;
  std::map<uint32_t, Barrier> barriers;
  Named named[16];
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t entry;
  jmp_buf place;  // where the fiber continues; swapcontext would make two system calls each time
  int thread, block;
  bool begun = false, done = false;
  const std::function<bool()>* ready = nullptr;
  const char* waits_for = "";
  std::vector<std::function<void()>> copies;
  std::vector<std::vector<Product>> groups;                // groups of wgmma; the last one is open
  std::vector<std::function<void()>> open_stores, stores;  // before and after the commit; all may be read late
  std::vector<uint32_t> unfenced;                          // where it wrote 16 bytes that the copy engine may not see
};

struct Machine {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<std::function<void()>> engine;  // the copy engine's queue, run in any order
  std::mt19937_64 random;
  std::vector<std::unique_ptr<char[]>> stacks;  // the fibers' stacks, reused by the next cluster
  jmp_buf scheduler;
  Fiber* current = nullptr;
  Index first_block{};
  unsigned threads = 0;
  uint32_t shared = 0;
  const std::function<void()>* kernel = nullptr;
  Named cluster;
  std::string failure;
};

Machine* machine = nullptr;

Block& block() { return machine->blocks[machine->current->block]; }

void enter() {
  try {
    (*machine->kernel)();
  } catch (const std::exception& error) {
    if (machine->failure.empty()) machine->failure = error.what();
  }
  machine->current->done = true;
  _longjmp(machine->scheduler, 1);
}

void run(Fiber& fiber) {
  machine->current = &fiber;
  thread_index.x = fiber.thread;
  block_index.x = machine->first_block.x + fiber.block;
  block_size.x = machine->threads;
  own_shared = machine->blocks[fiber.block].base;
  own_shared_bytes = machine->shared;
  if (_setjmp(machine->scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.entry);
}

bool chance(int one_in) { return machine->random() % one_in == 0; }

}  // namespace

void fail(const std::string& what) {
  throw std::runtime_error(what + " (thread " + std::to_string(machine->current->thread) + " of block " +
                           std::to_string(block_index.x) + ")");
}

void wait_until(const std::function<bool()>& ready, const char* what) {
  Fiber& self = *machine->current;
  // Sometimes lets others run first, even if there is nothing to wait for.
  if (ready() && !chance(8)) return;
  self.ready = &ready, self.waits_for = what;
  if (!_setjmp(self.place)) _longjmp(machine->scheduler, 1);
  self.ready = nullptr;
  if (!machine->failure.empty()) throw std::runtime_error(machine->failure);
}

unsigned cluster_rank() { return machine->current->block; }

namespace {

template <class From>
uint32_t exchange(uint32_t value, const From& from) {
  Warp& warp = block().warps[thread_index.x / 32];
  int lane = thread_index.x % 32;
  wait_until([&] { return warp.left == 0; }, "the last shuffle to end");
  int generation = warp.generation;
  warp.values[lane] = value;
  if (++warp.arrived == 32) warp.arrived = 0, warp.left = 32, ++warp.generation;
  wait_until([&] { return warp.generation != generation; }, "the other lanes of a shuffle");
  uint32_t result = warp.values[from(lane)];
  --warp.left;
  return result;
}

}  // namespace

uint32_t shuffle_xor(uint32_t value, int distance) {
  return exchange(value, [distance](int lane) { return lane ^ distance; });
}

uint32_t shuffle(uint32_t value, int lane) {
  return exchange(value, [lane](int) { return lane; });
}

void named_barrier(int identity, int threads, bool wait) {
  Named& barrier = block().named[identity];
  int generation = barrier.generation;
  if (++barrier.arrived > threads) fail("more threads at a named barrier than it takes");
  if (barrier.arrived == threads) barrier.arrived = 0, ++barrier.generation;
  if (wait) wait_until([&] { return barrier.generation != generation; }, "a named barrier");
}

void cluster_barrier() {
  Named& barrier = machine->cluster;
  int generation = barrier.generation;
  if (++barrier.arrived == static_cast<int>(machine->fibers.size())) barrier.arrived = 0, ++barrier.generation;
  wait_until([&] { return barrier.generation != generation; }, "the cluster's barrier");
}

namespace {

Barrier& barrier_at(uint64_t* at, int of_block = -1) {
  int64_t offset = reinterpret_cast<uint8_t*>(at) - shared_base();
  if (offset < 0 || offset + 8 > machine->shared) fail("a barrier outside of shared memory");
  Block& owner = of_block < 0 ? block() : machine->blocks.at(of_block);
  auto found = owner.barriers.find(offset);
  if (found == owner.barriers.end()) fail("a barrier that was not initialised");
  return found->second;
}

}  // namespace

void barrier_init(uint64_t* at, int arrivals) {
  Barrier barrier;
  barrier.expected = barrier.pending = arrivals;
  block().barriers[reinterpret_cast<uint8_t*>(at) - shared_base()] = barrier;
}

void barrier_arrive(uint64_t* at, int of_block, int arrivals, int64_t bytes) {
  Barrier& barrier = barrier_at(at, of_block);
  barrier.bytes += bytes;
  barrier.pending -= arrivals;
  if (barrier.pending < 0) fail("more arrivals at a barrier than it takes");
  barrier.settle();
}

void barrier_wait(uint64_t* at, uint32_t parity) {
  Barrier& barrier = barrier_at(at);
  wait_until([&] { return (barrier.phase & 1) != static_cast<int>(parity); }, "an mbarrier");
}

void load_box(void* to, const Map& map, uint64_t* at, const int* corner, uint32_t blocks) {
  uint32_t offset = static_cast<uint8_t*>(to) - shared_base();
  uint32_t bytes = 2 * map.box[0] * map.box[1] * map.box[2];
  if (offset % 1024) fail("a box that does not begin at a multiple of 1,024");
  if (offset + bytes > machine->shared) fail("a box outside of shared memory");
  int x0 = corner[0], y0 = corner[1], z0 = corner[2];
  for (int b = 0; b < static_cast<int>(machine->blocks.size()); ++b) {
    if (!(blocks >> b & 1)) continue;
    Barrier* barrier = &barrier_at(at, b);
    uint8_t* base = machine->blocks[b].base;
    machine->engine.push_back([=] {
      uint32_t address = offset;
      for (int z = z0; z < z0 + map.box[2]; ++z)
        for (int y = y0; y < y0 + map.box[1]; ++y)
          for (int x = x0; x < x0 + map.box[0]; ++x, address += 2) {
            bool inside = x < map.sizes[0] && y < map.sizes[1] && z < map.sizes[2];
            uint16_t bits = 0;
            if (inside) std::memcpy(&bits, map.base + z * map.strides[2] + y * map.strides[1] + x * map.strides[0], 2);
            std::memcpy(base + (address ^ (address >> 7 & 7) << 4), &bits, 2);
          }
      barrier->bytes -= bytes;
      barrier->settle();
    });
  }
}

void store_box(const Map& map, const void* from, const int* corner) {
  uint32_t offset = static_cast<const uint8_t*>(from) - shared_base();
  uint32_t bytes = 2 * map.box[0] * map.box[1] * map.box[2];
  if (offset % 1024) fail("a box that does not begin at a multiple of 1,024");
  if (offset + bytes > machine->shared) fail("a box outside of shared memory");
  if (reinterpret_cast<uintptr_t>(map.base) % 16 || map.strides[1] % 16 || map.strides[2] % 16)
    fail("a tensor that is not aligned to 16 bytes");
  for (const Fiber& fiber : machine->fibers)
    if (fiber.block == machine->current->block)
      for (uint32_t at : fiber.unfenced)
        if (at >= offset && at < offset + bytes) fail("a bulk store of what was written without a fence");
  int x0 = corner[0], y0 = corner[1], z0 = corner[2];
  const uint8_t* base = shared_base();
  auto store = [=] {
    uint32_t address = offset;
    for (int z = z0; z < z0 + map.box[2]; ++z)
      for (int y = y0; y < y0 + map.box[1]; ++y)
        for (int x = x0; x < x0 + map.box[0]; ++x, address += 2) {
          if (x >= map.sizes[0] || y >= map.sizes[1] || z >= map.sizes[2]) continue;
          auto* to = const_cast<uint8_t*>(map.base) + z * map.strides[2] + y * map.strides[1] + x * map.strides[0];
          std::memcpy(to, base + (address ^ (address >> 7 & 7) << 4), 2);
        }
  };
  machine->current->open_stores.push_back(store);
}

void store_commit() {
  auto& self = *machine->current;
  for (auto& store : self.open_stores)
    if (chance(4))
      store();
    else
      self.stores.push_back(std::move(store));
  self.open_stores.clear();
}

void store_wait_read() {
  for (auto& store : machine->current->stores) store();
  machine->current->stores.clear();
}

void written(uint32_t offset) { machine->current->unfenced.push_back(offset); }
void engine_fence() { machine->current->unfenced.clear(); }

void later(std::function<void()> action) { machine->current->copies.push_back(std::move(action)); }

void finish_copies() {
  for (auto& copy : machine->current->copies) copy();
  machine->current->copies.clear();
}

void wgmma_issue(const Product& product) {
  auto& groups = machine->current->groups;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(product);
}

void wgmma_commit() { machine->current->groups.emplace_back(); }

void wgmma_wait(int in_flight) {
  auto& groups = machine->current->groups;  // all are committed but the last, which is open
  while (static_cast<int>(groups.size()) - 1 > in_flight) {
    for (Product& p : groups.front()) p.multiply(p);
    groups.erase(groups.begin());
  }
}

uint16_t to_bits(float x, __half) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
uint16_t to_bits(float x, __nv_bfloat16) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

void launch(int64_t clusters, int cluster, int threads, uint32_t shared, uint64_t seed,
            const std::function<void()>& kernel) {
  Machine emulated;
  machine = &emulated;
  emulated.random.seed(seed);
  emulated.threads = threads;
  emulated.shared = shared;
  emulated.kernel = &kernel;
  for (int i = 0; i < cluster * threads; ++i) emulated.stacks.emplace_back(new char[kStack]);
  for (int64_t c = 0; c < clusters; ++c) {
    emulated.first_block.x = c * cluster;
    emulated.cluster = {};
    emulated.blocks = std::vector<Block>(cluster);
    for (Block& b : emulated.blocks) {
      b.memory.assign(shared + 1024, 0xff);  // NaN: memory that was never written must not matter
      b.base = b.memory.data() + 1024 - reinterpret_cast<uintptr_t>(b.memory.data()) % 1024;
      b.warps.resize(threads / 32);
    }
    emulated.fibers = std::vector<Fiber>(cluster * threads);
    for (int i = 0; i < cluster * threads; ++i) {
      Fiber& fiber = emulated.fibers[i];
      fiber.thread = i % threads, fiber.block = i / threads;
      getcontext(&fiber.entry);
      fiber.entry.uc_stack.ss_sp = emulated.stacks[i].get();
      fiber.entry.uc_stack.ss_size = kStack;
      fiber.entry.uc_link = nullptr;
      makecontext(&fiber.entry, enter, 0);
    }
    std::vector<int> order(emulated.fibers.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    auto copy = [&] {
      size_t which = emulated.random() % emulated.engine.size();
      auto action = std::move(emulated.engine[which]);
      emulated.engine.erase(emulated.engine.begin() + which);
      action();
    };
    while (true) {
      std::shuffle(order.begin(), order.end(), emulated.random);
      bool moved = false, all_done = true;
      for (int i : order) {
        Fiber& fiber = emulated.fibers[i];
        if (fiber.done) continue;
        all_done = false;
        if (!emulated.engine.empty() && chance(500)) copy(), moved = true;
        emulated.current = &fiber;
        if (fiber.ready && emulated.failure.empty() && !(*fiber.ready)()) continue;
        run(fiber);
        moved = true;
      }
      if (all_done) break;
      if (moved) continue;
      if (!emulated.engine.empty()) {
        copy();
        continue;
      }
      std::map<std::string, int> waiting;
      for (Fiber& fiber : emulated.fibers)
        if (!fiber.done) ++waiting[fiber.waits_for];
      emulated.failure = "deadlock:";
      for (auto& [what, count] : waiting)
        emulated.failure += " " + std::to_string(count) + " threads wait for " + what + ";";
    }
    bool outlived = !emulated.engine.empty();
    for (const Fiber& fiber : emulated.fibers) outlived |= !fiber.stores.empty() || !fiber.open_stores.empty();
    if (emulated.failure.empty() && outlived) emulated.failure = "a copy outlives its block";
    if (!emulated.failure.empty()) break;
  }
  machine = nullptr;
  if (!emulated.failure.empty()) throw std::runtime_error(emulated.failure);
}

}  // namespace emulator
