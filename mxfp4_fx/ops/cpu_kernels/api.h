// The entry points that Python calls through ctypes (ops/cpu*.py, ops/program.py), each defined in
// the .cpp whose first comment names it. For each instruction-set path, one library is built with
// all of them, and before it one with those of weights, which come last here. All libraries read
// the same layout of MXFP4 weights, `cpu_panels` (panels.h).
//
// Shape letters as in ops/reference.py: T tokens, E experts, A experts per token, R = T * A routed
// rows, K contraction, N output. Functions that can fail return 0 or an errno: EINVAL if an index
// or an offset points outside its tensor, ENOMEM if there is no memory.
#pragma once

#include <cstdint>

enum mxfp4_dtype : int32_t { MXFP4_F32 = 0, MXFP4_BF16 = 1, MXFP4_F16 = 2 };
enum mxfp4_index_dtype : int32_t { MXFP4_I32 = 0, MXFP4_I64 = 1 };
// What ops/reference.py's `activate` defines. SwiGLU and GEGLU are gated: of two columns, gate and
// up, they make one.
enum mxfp4_activation : int32_t {
  MXFP4_NONE = 0,
  MXFP4_SWIGLU = 1,
  MXFP4_GEGLU_TANH = 2,
  MXFP4_RELU2 = 3
};

// Arguments of mxfp4_matmul_ogs. Pointers first, then 8-byte, then 4-byte numbers, so that there is
// no padding between them.
struct mxfp4_matmul {
  const void* x;                  // [x_rows, K] of x_dtype, x_stride elements apart
  const uint8_t* panels;          // [E, P, Q, 1088]
  const uint8_t* flags;           // [E, P]
  const void* bias;               // [E, N] of bias_dtype, contiguous, or null
  const int32_t* expert_offsets;  // [E + 1]
  const int32_t* gather_index;    // [R] or null: row r reads x[r]
  const int32_t* scatter_index;   // [R] or null: row r of the result is row r
  const float* gammas;            // [R] or null
  void* y;                        // [R or T, N or N / 2] of x_dtype; all of it is written
  int64_t x_rows, x_stride, rows, experts, n, k, experts_per_token;
  int32_t x_dtype, bias_dtype;
  int32_t activation;  // mxfp4_activation
  int32_t threads;
  float alpha, limit, up_offset;  // of a gated activation
};

// One linear of mxfp4_linears: its weight, and where its result goes.
struct mxfp4_linear {
  const void* weight;  // [N, K], rows `stride` elements apart
  const void* bias;    // [N], contiguous, or null
  void* y;             // [rows, N], contiguous; all of it is written
  int64_t n, stride;
};

// One linear of mxfp8_linears: its weight in MXFP8 (core/mxfp8.py), and where its result goes.
struct mxfp8_linear {
  const uint8_t* codes;   // [N, K], contiguous
  const uint8_t* scales;  // [N, K / 32], contiguous
  const void* bias;       // [N], contiguous, or null
  void* y;                // [rows, N], contiguous; all of it is written
  int64_t n;
};

// Arguments of mxfp4_linears, which `count` times mxfp4_linear follows, and of mxfp8_linears, which
// `count` times mxfp8_linear follows. All tensors of values have one dtype.
struct mxfp4_linear_group {
  const void* x;  // [rows, K], rows `x_stride` elements apart
  int64_t rows, x_stride, k, count;
  int32_t dtype, threads;
};

// Arguments of mxfp4_attention_with_sinks. All tensors have one dtype; strides are in elements, and
// those of the last dimensions are 1.
struct mxfp4_attention {
  const void* query;  // [B, H, size]
  const void* key;    // [B, KV, keys, size]; H is a multiple of KV
  const void* value;  // [B, KV, keys, size]
  const void* sinks;  // [H]
  const void* mask;   // [B, H, keys] or null
  void* result;       // [B, H, size], contiguous; all of it is written
  int64_t batch, heads, key_heads, keys, size;
  int64_t query_batch, query_head;
  int64_t key_batch, key_head, key_token, value_batch, value_head, value_token;
  int64_t sinks_stride, mask_batch, mask_head;
  int32_t dtype, threads;
  float scale;
};

// Arguments of mxfp4_routing. Of `all` experts those from `first` on are held here, `experts` many;
// rows of the others go last and get gamma 0.
struct mxfp4_router {
  const void* logits;                     // [T, all], rows `stride` elements apart
  float* gammas;                          // [R]
  int32_t *gather_index, *scatter_index;  // [R]
  int32_t* expert_offsets;                // [E + 1]
  int64_t tokens, stride, all, top_k, experts, first;
  int32_t dtype, threads;
};

// Arguments of an elementwise instruction: out = operation(a, b), with at most four dimensions. A
// dimension along which an operand has one element has stride 0. Strides are in elements.
enum mxfp4_operation : int32_t {
  MXFP4_COPY = 0,
  MXFP4_ADD = 1,
  MXFP4_SUB = 2,
  MXFP4_MUL = 3,
  MXFP4_RSQRT = 4,
  MXFP4_MEAN = 5  // over the last dimension
};
struct mxfp4_elementwise {
  const void* a;
  const void* b;  // or null: `scalar` in its place
  void* out;
  int64_t sizes[4], a_strides[4], b_strides[4], out_strides[4];
  int32_t operation, a_dtype, b_dtype, out_dtype;
  float scalar;
};

// An instruction of a program: this, and the arguments of its kernel.
enum mxfp4_kind : int32_t {
  MXFP4_ELEMENTWISE = 0,
  MXFP4_MATMUL_OGS = 1,
  MXFP4_ROUTING = 2,
  MXFP4_ATTENTION = 3,
  MXFP4_LINEARS = 4,
  MXFP8_LINEARS = 5
};
struct mxfp4_instruction {
  int32_t kind, bytes;  // a multiple of 8, with this header
};

// Eight bytes of a program's code that each call sets to slots[slot] + offset: pointers, sizes.
struct mxfp4_link {
  int64_t position, slot, offset;
};

// A program. The first slots are of every program: memory of `code_bytes` for the call's copy of
// the code, the number of threads, and which bytes of the code are run.
enum mxfp4_slot : int64_t {
  MXFP4_CODE_SLOT = 0,
  MXFP4_THREADS_SLOT = 1,
  MXFP4_FIRST_SLOT = 2,
  MXFP4_END_SLOT = 3
};
struct mxfp4_program {
  const void* code;
  const mxfp4_link* link;
  int64_t code_bytes, links;
};

// Only these names are exported. Libraries of several paths may be loaded side by side, and the
// loader must not resolve a name of one library to the same name in another.
#pragma GCC visibility push(default)
extern "C" {

// Must be called first. Asks the system for permission that the path needs (AMX) and computes small
// problems. `forked` is 1 if this process is the fork of one that may have had threads. Returns 0
// or an errno; EDOM if a result is wrong.
int mxfp4_init(int32_t forked);

int mxfp4_matmul_ogs(const mxfp4_matmul* arguments);

// Linears of one input.
void mxfp4_linears(const mxfp4_linear_group* arguments);

// The same with weights in MXFP8. K is a multiple of 32.
int mxfp8_linears(const mxfp4_linear_group* arguments);

// Attention with sinks of one query a head. Returns ENOTSUP, and computes nothing, for heads that
// are not whole vectors or are larger than 256.
int mxfp4_attention_with_sinks(const mxfp4_attention* arguments);

int mxfp4_routing(const mxfp4_router* arguments);

// The same from given routes: ids [T, A] and weights [T, A], contiguous; ids outside of
// [first, first + experts) are those of experts held elsewhere.
int mxfp4_routing_routes(const void* ids, int32_t index_dtype, const void* weights, int32_t dtype,
                         int64_t tokens, int64_t per_token, int64_t experts, int64_t first,
                         float* gammas, int32_t* gather, int32_t* scatter, int32_t* offsets,
                         int32_t threads);

// Runs a program's instructions in order, until one fails.
int mxfp4_run(const mxfp4_program* program, const int64_t* slots);

// What mxfp4_init does for the functions of weights, which need no permission.
int mxfp4_init_weights(int32_t forked);

// Values [N, K], rows `stride` elements apart -> MXFP8, rounded as mxfp8.quantize does; and back to
// contiguous values, rounded to nearest. K is a multiple of 32.
void mxfp8_quantize(const void* source, int32_t dtype, int64_t n, int64_t k, int64_t stride,
                    uint8_t* codes, uint8_t* scales, int32_t threads);
void mxfp8_dequantize(const uint8_t* codes, const uint8_t* scales, int64_t n, int64_t k,
                      int32_t dtype, void* values, int32_t threads);

// Contiguous blocks [E, N, K/32, 16] and scales [E, N, K/32] in checkpoint order -> cpu_panels, and
// back. An expert's row 2 p + h is its row `pair` p + `odd` h in memory: 2 and 1 if rows are in
// order, 1 and N / 2 if all gates come before all ups. Rows in memory are all below N.
int mxfp4_swizzle(const uint8_t* blocks, const uint8_t* scales, int64_t experts, int64_t n,
                  int64_t k, int64_t pair, int64_t odd, uint8_t* panels, uint8_t* flags,
                  int32_t threads);
int mxfp4_unswizzle(const uint8_t* panels, int64_t experts, int64_t n, int64_t k, uint8_t* blocks,
                    uint8_t* scales, int32_t threads);

// Values [E, N, K] with any strides (in elements) -> cpu_panels, rounded as formats.quantize does.
// Row 2 p + h of an expert is at `pair` p + `odd` h.
int mxfp4_quantize(const void* source, int32_t dtype, int64_t experts, int64_t n, int64_t k,
                   int64_t stride_e, int64_t pair, int64_t odd, int64_t stride_k, uint8_t* panels,
                   uint8_t* flags, int32_t threads);

// Hints that huge pages should back [start, start + bytes), before the first write to it.
void mxfp4_huge_pages(void* start, int64_t bytes);
}
#pragma GCC visibility pop
