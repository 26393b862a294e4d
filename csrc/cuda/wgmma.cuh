// wgmma: acc[64, kWidth] (+)= A[64, 16] B[kWidth, 16]ᵀ, K-major in shared memory (or A in registers), sums in float32.
//
// A in registers has the layout of the packed accumulators of two neighbouring blocks of eight columns.
//
// Inline assembly needs operand numbers as literals, so macros build the lists "%0,%1,..." and "+f"(d[0]),..., four
// registers (eight columns) at a time.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pacl::cuda {

template <int kWidth, class T>
struct Wgmma;

#define PACL_N1 "%0,%1,%2,%3"
#define PACL_O1 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define PACL_N2 PACL_N1 ",%4,%5,%6,%7"
#define PACL_O2 PACL_O1, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define PACL_N3 PACL_N2 ",%8,%9,%10,%11"
#define PACL_O3 PACL_O2, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define PACL_N4 PACL_N3 ",%12,%13,%14,%15"
#define PACL_O4 PACL_O3, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define PACL_N5 PACL_N4 ",%16,%17,%18,%19"
#define PACL_O5 PACL_O4, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define PACL_N6 PACL_N5 ",%20,%21,%22,%23"
#define PACL_O6 PACL_O5, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define PACL_N7 PACL_N6 ",%24,%25,%26,%27"
#define PACL_O7 PACL_O6, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define PACL_N8 PACL_N7 ",%28,%29,%30,%31"
#define PACL_O8 PACL_O7, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PACL_N9 PACL_N8 ",%32,%33,%34,%35"
#define PACL_O9 PACL_O8, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define PACL_N10 PACL_N9 ",%36,%37,%38,%39"
#define PACL_O10 PACL_O9, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define PACL_N11 PACL_N10 ",%40,%41,%42,%43"
#define PACL_O11 PACL_O10, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define PACL_N12 PACL_N11 ",%44,%45,%46,%47"
#define PACL_O12 PACL_O11, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define PACL_N13 PACL_N12 ",%48,%49,%50,%51"
#define PACL_O13 PACL_O12, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define PACL_N14 PACL_N13 ",%52,%53,%54,%55"
#define PACL_O14 PACL_O13, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define PACL_N15 PACL_N14 ",%56,%57,%58,%59"
#define PACL_O15 PACL_O14, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define PACL_N16 PACL_N15 ",%60,%61,%62,%63"
#define PACL_O16 PACL_O15, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define PACL_N17 PACL_N16 ",%64,%65,%66,%67"
#define PACL_O17 PACL_O16, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define PACL_N18 PACL_N17 ",%68,%69,%70,%71"
#define PACL_O18 PACL_O17, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define PACL_N19 PACL_N18 ",%72,%73,%74,%75"
#define PACL_O19 PACL_O18, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define PACL_N20 PACL_N19 ",%76,%77,%78,%79"
#define PACL_O20 PACL_O19, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define PACL_N21 PACL_N20 ",%80,%81,%82,%83"
#define PACL_O21 PACL_O20, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define PACL_N22 PACL_N21 ",%84,%85,%86,%87"
#define PACL_O22 PACL_O21, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define PACL_N23 PACL_N22 ",%88,%89,%90,%91"
#define PACL_O23 PACL_O22, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define PACL_N24 PACL_N23 ",%92,%93,%94,%95"
#define PACL_O24 PACL_O23, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define PACL_N25 PACL_N24 ",%96,%97,%98,%99"
#define PACL_O25 PACL_O24, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define PACL_N26 PACL_N25 ",%100,%101,%102,%103"
#define PACL_O26 PACL_O25, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define PACL_N27 PACL_N26 ",%104,%105,%106,%107"
#define PACL_O27 PACL_O26, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define PACL_N28 PACL_N27 ",%108,%109,%110,%111"
#define PACL_O28 PACL_O27, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define PACL_N29 PACL_N28 ",%112,%113,%114,%115"
#define PACL_O29 PACL_O28, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define PACL_N30 PACL_N29 ",%116,%117,%118,%119"
#define PACL_O30 PACL_O29, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define PACL_N31 PACL_N30 ",%120,%121,%122,%123"
#define PACL_O31 PACL_O30, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define PACL_N32 PACL_N31 ",%124,%125,%126,%127"
#define PACL_O32 PACL_O31, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// GROUPS: groups of eight columns. O0 to O5: the operand numbers after the 4 * GROUPS accumulators.
// clang-format off: one instruction's text a line
#define PACL_WGMMA(WIDTH, GROUPS, O0, O1, O2, O3, O4, O5, TYPE, NAME)                                            \
  template <>                                                                                                    \
  struct Wgmma<WIDTH, TYPE> {                                                                                    \
    using Accumulators = float (&)[WIDTH / 2];                                                                   \
    static __device__ __forceinline__ void multiply(Accumulators d, uint64_t a, uint64_t b, int accumulate) {    \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #O2 ", 0;\n"                                               \
                   "wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." NAME "." NAME " {" PACL_N##GROUPS "}, " \
                   "%" #O0 ", %" #O1 ", p, 1, 1, 0, 0; }\n"                                                      \
                   : PACL_O##GROUPS                                                                              \
                   : "l"(a), "l"(b), "r"(accumulate));                                                           \
    }                                                                                                            \
    static __device__ __forceinline__ void multiply(                                                             \
        Accumulators d, const uint32_t (&a)[4], uint64_t b, int accumulate) {                                    \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #O5 ", 0;\n"                                               \
                   "wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." NAME "." NAME " {" PACL_N##GROUPS "}, " \
                   "{%" #O0 ", %" #O1 ", %" #O2 ", %" #O3 "}, %" #O4 ", p, 1, 1, 0; }\n"                         \
                   : PACL_O##GROUPS                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                       \
    }                                                                                                            \
  };
// clang-format on

#define PACL_WGMMA_BOTH(WIDTH, GROUPS, O0, O1, O2, O3, O4, O5)             \
  PACL_WGMMA(WIDTH, GROUPS, O0, O1, O2, O3, O4, O5, __nv_bfloat16, "bf16") \
  PACL_WGMMA(WIDTH, GROUPS, O0, O1, O2, O3, O4, O5, __half, "f16")

PACL_WGMMA_BOTH(128, 16, 64, 65, 66, 67, 68, 69)
PACL_WGMMA_BOTH(144, 18, 72, 73, 74, 75, 76, 77)
PACL_WGMMA_BOTH(160, 20, 80, 81, 82, 83, 84, 85)
PACL_WGMMA_BOTH(176, 22, 88, 89, 90, 91, 92, 93)
PACL_WGMMA_BOTH(192, 24, 96, 97, 98, 99, 100, 101)
PACL_WGMMA_BOTH(200, 25, 100, 101, 102, 103, 104, 105)
PACL_WGMMA_BOTH(208, 26, 104, 105, 106, 107, 108, 109)
PACL_WGMMA_BOTH(224, 28, 112, 113, 114, 115, 116, 117)
PACL_WGMMA_BOTH(232, 29, 116, 117, 118, 119, 120, 121)
PACL_WGMMA_BOTH(248, 31, 124, 125, 126, 127, 128, 129)
PACL_WGMMA_BOTH(256, 32, 128, 129, 130, 131, 132, 133)

}  // namespace pacl::cuda
