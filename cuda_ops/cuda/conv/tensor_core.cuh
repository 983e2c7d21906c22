// The instructions of the tensor cores and of asynchronous copies as functions.
// tests/cuda_ops/emulator/tensor_core_emu.h implements the same functions on the host and describes their fragments.
// Shared memory addresses have 32 bits.
#pragma once
#include <type_traits>
#include "cuda/kernel_common.cuh"
#ifdef DCN_EMULATE
#include "emulator/tensor_core_emu.h"
#else
#define DCN_DYN_SMEM(T, name)                                     \
  extern __shared__ __align__(1024) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)
namespace dcnseg_ops {

using Bfloat16 = __nv_bfloat16;
using Float16 = __half;

// Two 16-bit elements in one register.
__device__ inline float2 unpack(uint32_t word, const Bfloat16*) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ inline float2 unpack(uint32_t word, const Float16*) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ inline uint32_t pack(float low, float high, const Bfloat16*) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ inline uint32_t pack(float low, float high, const Float16*) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}
// 16 bytes at base + index * pitch; zeros without a read unless wanted and 0 <= index. One asm statement, because the
// compiler would otherwise split the address computation and issue the load only when the value is needed.
__device__ inline uint4 load_or_zeros(const char* base, int32_t index, uint32_t pitch, bool wanted) {
  uint4 v;
  asm volatile(
      "{ .reg .pred p, q;\n .reg .b64 address;\n"
      "setp.ne.s32 q, %7, 0;\n setp.ge.and.s32 p, %5, 0, q;\n"
      "mad.wide.u32 address, %5, %6, %4;\n"
      "mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
      "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [address]; }"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(__cvta_generic_to_global(base)), "r"(index), "r"(pitch), "r"(static_cast<int>(wanted)));
  return v;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ inline void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Copies 16 bytes, or writes zeros without a read.
__device__ inline void copy_async(uint32_t to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(wanted ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kMayRun>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kMayRun) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane l provides the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&matrix)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
}

// d += A B, where A is 16 x 32 bytes and B 32 bytes x 8.
#define DCN_MULTIPLY_ADD(T, instruction)                                                                           \
  __device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const T*) { \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                  \
  }
DCN_MULTIPLY_ADD(Bfloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
DCN_MULTIPLY_ADD(Float16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
DCN_MULTIPLY_ADD(float, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef DCN_MULTIPLY_ADD

// Barriers in shared memory: a phase is complete after the given number of arrivals; wait for its parity, initially 0.
__device__ inline void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ inline void wait_for(uint64_t* barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (!complete) {
    asm volatile(
        "{ .reg .pred p;\n"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
#else
        "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
// A barrier for some warps of the block; 0 is __syncthreads.
template <int kCount>
__device__ inline void sync_named(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kCount) : "memory");
}

// wgmma: GEMMs that the four warps of a warpgroup issue together on matrices in shared memory. Only available in
// machine code for sm_90a.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DCN_HAS_WGMMA 1
#define DCN_WGMMA_ASM(...) asm volatile(__VA_ARGS__)
#else
#define DCN_HAS_WGMMA 0
#define DCN_WGMMA_ASM(...) __trap()
#endif

#define DCN_REGISTERS_32                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DCN_REGISTERS_64                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DCN_SUMS_8(d, i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define DCN_SUMS_32(d, i) DCN_SUMS_8(d, i), DCN_SUMS_8(d, i + 8), DCN_SUMS_8(d, i + 16), DCN_SUMS_8(d, i + 24)
#define DCN_SUMS_64(d, i) DCN_SUMS_32(d, i), DCN_SUMS_32(d, i + 32)
// d += A B: A is 64 x 32 bytes, B 32 bytes x n, both contiguous along the depth.
#define DCN_PRODUCT(T, n, sums, type, a, b, transposed)                                                            \
  template <int kColumns>                                                                                          \
  __device__ inline std::enable_if_t<kColumns == n> issue_product(float (&d)[sums], uint64_t left, uint64_t right, \
                                                                  const T*) {                                      \
    DCN_WGMMA_ASM("wgmma.mma_async.sync.aligned.m64n" #n type " {" DCN_REGISTERS_##sums                            \
                  "}, %" #a ", %" #b ", 1, 1, 1" transposed ";" : DCN_SUMS_##sums(d, 0) : "l"(left),               \
                  "l"(right));                                                                                     \
  }
#define DCN_PRODUCTS(T, type, transposed)          \
  DCN_PRODUCT(T, 64, 32, type, 32, 33, transposed) \
  DCN_PRODUCT(T, 128, 64, type, 64, 65, transposed)
DCN_PRODUCTS(Bfloat16, "k16.f32.bf16.bf16", ", 0, 0")
DCN_PRODUCTS(Float16, "k16.f32.f16.f16", ", 0, 0")
DCN_PRODUCTS(float, "k8.f32.tf32.tf32", "")
#undef DCN_PRODUCTS
#undef DCN_PRODUCT

// Orders the calling thread's writes to shared memory before the wgmma instructions of other threads that read them.
__device__ inline void fence_async_proxy() { DCN_WGMMA_ASM("fence.proxy.async.shared::cta;" :: : "memory"); }
__device__ inline void fence_products() { DCN_WGMMA_ASM("wgmma.fence.sync.aligned;" :: : "memory"); }
__device__ inline void commit_products() { DCN_WGMMA_ASM("wgmma.commit_group.sync.aligned;" :: : "memory"); }
template <int kMayRun>
__device__ inline void wait_for_products() {
  DCN_WGMMA_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(kMayRun) : "memory");
}
// Sets the number of registers that each thread of a warpgroup may use from here on.
template <int kRegisters>
__device__ inline void raise_registers() {
  DCN_WGMMA_ASM("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void lower_registers() {
  DCN_WGMMA_ASM("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace dcnseg_ops
#endif
