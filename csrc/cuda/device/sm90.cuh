// Hopper's own instructions, as thin functions: mbarriers, bulk tensor copies, asynchronous matrix products of a
// warpgroup. Names and operand order follow the PTX manual.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace plora::cuda::sm90 {

__device__ inline uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// --- mbarriers, by their addresses ---

__device__ inline void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\nbra again;\nover:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier, int count = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// By a warp that is done with what the barrier stands for.
__device__ inline void release(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// One lane of a warp, all of whose lanes are here. Where the whole warp goes through a loop of copies and this lane
// alone asks for them, what they need stays in uniform registers; within a branch of one lane, the compiler moves all
// of it there for each copy anew, in a loop over the lanes, which may take as long as a stage's product.
__device__ inline bool elect() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(chosen));
  return chosen != 0;
}

// Here and below `chosen`: whether this lane is to do it.
__device__ inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes, bool chosen = true) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n}" ::"r"(
          barrier),
      "r"(bytes), "r"(static_cast<int>(chosen))
      : "memory");
}

__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Ordinary stores to shared memory become visible to the copy engine and the matrix units.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// By all warps of a warpgroup: gives up registers, or asks for them, to have so many a thread.
template <int kCount>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- clusters: blocks that run at the same time and see each other's shared memory ---

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline uint32_t cluster_blocks() {
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

// All threads of all blocks: what one wrote before others may read afterwards.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The place in block `rank` that is `here` in this one.
__device__ inline uint32_t place_in_block(uint32_t here, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
}

__device__ inline float4 load_from_block(uint32_t there) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}

// To such a place; its barrier counts the bytes.
__device__ inline void store_to_block(uint32_t there, uint32_t value, uint32_t barrier_there) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
               "r"(value), "r"(barrier_there)
               : "memory");
}

__device__ inline void barrier_arrive_in_block(uint32_t barrier_there) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier_there) : "memory");
}

// --- bulk tensor copies ---------------------------------------------------------------------------------------------

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ inline void load_2d(const CUtensorMap* map, uint32_t barrier, uint32_t to, int c0, int c1, bool chosen) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n}" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(static_cast<int>(chosen))
      : "memory");
}

// From shared memory, once the writes to it are fenced (fence_async); what lies outside of the tensor is left out.
__device__ inline void store_2d(const CUtensorMap* map, uint32_t from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(c0), "r"(c1)
               : "memory");
}

// L2 then gives up what was stored before what is read.
__device__ inline void store_3d_once(const CUtensorMap* map, uint32_t from, int c0, int c1, int c2) {
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4}], [%1], policy;\n}" ::"l"(
          map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until shared memory has been read by all of this thread's stores but the last kPending groups.
template <int kPending = 0>
__device__ inline void store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// To L2 alone.
__device__ inline void prefetch_2d(const CUtensorMap* map, int c0, int c1) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(c0), "r"(c1) : "memory");
}

__device__ inline void load_3d(const CUtensorMap* map, uint32_t barrier, uint32_t to, int c0, int c1, int c2,
                               bool chosen) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
      "@p cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];\n}" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(static_cast<int>(chosen))
      : "memory");
}

__device__ inline void load_4d(const CUtensorMap* map, uint32_t barrier, uint32_t to, int c0, int c1, int c2, int c3,
                               bool chosen = true) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %7, 0;\n"
      "@p cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n}" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(static_cast<int>(chosen))
      : "memory");
}

// --- warpgroup products ---------------------------------------------------------------------------------------------

enum class Swizzle : uint64_t { none = 0, b128 = 1, b64 = 2, b32 = 3 };

// Where an operand lies in shared memory: address and strides in bytes.
__device__ constexpr uint64_t operand_layout(Swizzle swizzle, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}
__device__ inline uint64_t operand(uint64_t layout, uint32_t address) {
  return layout | static_cast<uint64_t>((address & 0x3ffff) >> 4);
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Tells the compiler that the accumulators change behind its back.
template <int kCount>
__device__ inline void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ inline void hold(uint32_t (&a)[kCount]) {  // or that factors are still read
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// d[64, N] += a[64, 16] b[N, 16]^T, or in place of d; each in K-major (kTrans = 0) or in M- or N-major order; of d the
// first N / 2 registers. Of 8 columns j, [4 j + {0, 1}] are row lane / 4, columns 2 (lane % 4) + {0, 1}, and
// [4 j + {2, 3}] eight rows further down; warp w of the warpgroup has the rows from 16 w on.
#define PLORA_OPS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PLORA_OPS8(i) PLORA_OPS4(i), PLORA_OPS4(i + 4)
#define PLORA_OPS16(i) PLORA_OPS8(i), PLORA_OPS8(i + 8)
#define PLORA_OPS32(i) PLORA_OPS16(i), PLORA_OPS16(i + 16)
#define PLORA_OPS40 PLORA_OPS32(0), PLORA_OPS8(32)
#define PLORA_OPS64 PLORA_OPS32(0), PLORA_OPS32(32)
#define PLORA_OPS96 PLORA_OPS64, PLORA_OPS32(64)
#define PLORA_OPS104 PLORA_OPS96, PLORA_OPS8(96)
#define PLORA_TEN(t) ",%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define PLORA_REGS4 "%0,%1,%2,%3"
#define PLORA_REGS8 PLORA_REGS4 ",%4,%5,%6,%7"
#define PLORA_REGS16 PLORA_REGS8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define PLORA_REGS32 PLORA_REGS8 ",%8,%9" PLORA_TEN(1) PLORA_TEN(2) ",%30,%31"
#define PLORA_REGS40 PLORA_REGS8 ",%8,%9" PLORA_TEN(1) PLORA_TEN(2) PLORA_TEN(3)
#define PLORA_REGS60 PLORA_REGS40 PLORA_TEN(4) PLORA_TEN(5)
#define PLORA_REGS64 PLORA_REGS60 ",%60,%61,%62,%63"
#define PLORA_REGS96 PLORA_REGS60 PLORA_TEN(6) PLORA_TEN(7) PLORA_TEN(8) ",%90,%91,%92,%93,%94,%95"
#define PLORA_REGS104 PLORA_REGS96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define PLORA_WGMMA(N, type, regs, ops, a_, b_, t_, u_, add_)                                                \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_ ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N   \
               "k16.f32." type "." type " {" regs "}, %" #a_ ", %" #b_ ", add, 1, 1, %" #t_ ", %" #u_ ";\n}" \
               : ops                                                                                         \
               : "l"(a), "l"(b), "n"(kTransA), "n"(kTransB), "r"(static_cast<int>(add)))

template <int kN, typename scalar, int kTransB, int kTransA = 0, int kCount>
__device__ inline void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool add = true) {
#define PLORA_WGMMA_TYPED(type)                                                                    \
  if constexpr (kN == 8) PLORA_WGMMA(8, type, PLORA_REGS4, PLORA_OPS4(0), 4, 5, 6, 7, 8);          \
  if constexpr (kN == 16) PLORA_WGMMA(16, type, PLORA_REGS8, PLORA_OPS8(0), 8, 9, 10, 11, 12);     \
  if constexpr (kN == 32) PLORA_WGMMA(32, type, PLORA_REGS16, PLORA_OPS16(0), 16, 17, 18, 19, 20); \
  if constexpr (kN == 64) PLORA_WGMMA(64, type, PLORA_REGS32, PLORA_OPS32(0), 32, 33, 34, 35, 36); \
  if constexpr (kN == 80) PLORA_WGMMA(80, type, PLORA_REGS40, PLORA_OPS40, 40, 41, 42, 43, 44);    \
  if constexpr (kN == 128) PLORA_WGMMA(128, type, PLORA_REGS64, PLORA_OPS64, 64, 65, 66, 67, 68);  \
  if constexpr (kN == 192) PLORA_WGMMA(192, type, PLORA_REGS96, PLORA_OPS96, 96, 97, 98, 99, 100); \
  if constexpr (kN == 208) PLORA_WGMMA(208, type, PLORA_REGS104, PLORA_OPS104, 104, 105, 106, 107, 108)
  if constexpr (std::is_same_v<scalar, __nv_bfloat16>) {
    PLORA_WGMMA_TYPED("bf16");
  } else {
    PLORA_WGMMA_TYPED("f16");
  }
#undef PLORA_WGMMA_TYPED
}

// d[64, 64] += a[64, 16] b[64, 16]^T, or in place of d; b in K-major order. Of each warp's 16 rows of a, lane 4 g + q
// has [g, 2 q], [g + 8, 2 q], [g, 2 q + 8] and [g + 8, 2 q + 8], each with the element to its right.
template <typename scalar>
__device__ inline void wgmma_registers(float (&d)[32], const uint32_t* a, uint64_t b, bool add) {
#define PLORA_WGMMA_TYPED(type)                                                                                 \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type \
               "." type " {" PLORA_REGS32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"                      \
               : PLORA_OPS32(0)                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<scalar, __nv_bfloat16>) {
    PLORA_WGMMA_TYPED("bf16");
  } else {
    PLORA_WGMMA_TYPED("f16");
  }
#undef PLORA_WGMMA_TYPED
}

// d[64, 256] += a[64, 8] b[256, 8]^T of float32 cut to TF32, both in K-major order.
__device__ inline void wgmma_tf32(float (&d)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k8.f32.tf32.tf32 {" PLORA_REGS104
      ",%104,%105,%106,%107,%108,%109" PLORA_TEN(11) ",%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, 1, 1, 1;"
      : PLORA_OPS96, PLORA_OPS32(96)
      : "l"(a), "l"(b));
}

// d[64, 128] = a[64, 8] b[128, 8]^T, or added to it. Of each warp's 16 rows of a, lane 4 g + q has [g, q], [g + 8, q],
// [g, q + 4] and [g + 8, q + 4].
template <bool kAdd>
__device__ inline void wgmma_tf32(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 {" PLORA_REGS64 "}, {%64,%65,%66,%67}, %68, add, 1, 1;\n}"
      : PLORA_OPS64
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd));
}

// Four 8 x 8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

}  // namespace plora::cuda::sm90
