// The functions of csrc/tiles/primitives.cuh for the CPU: each does what its namesake there says, and fails if it is used
// wrongly. Included by that file only.
#pragma once

namespace caco {

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    return uint32_t(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t both) {
    auto value = [](uint16_t bits) {
        return std::is_same_v<T, bf16> ? emu::bfloat16_to_float(bits) : emu::half_to_float(bits);
    };
    return {value(both & 0xFFFF), value(both >> 16)};
}

__device__ __forceinline__ float fast_exp2(float x) { return std::exp2(x); }

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct In {
        float *d;
        const uint32_t *a;
        uint32_t b[2];
    } in{d, a, {b0, b1}};
    int none;
    emu::collective(kFullWarp, "mma.m16n8k16", in, none, [](auto lanes, auto) {
        emu::count(emu::counters.matrix_products);
        auto value = [](uint32_t reg, int half) {
            const uint16_t bits = half ? reg >> 16 : reg & 0xFFFF;
            return std::is_same_v<T, bf16> ? emu::bfloat16_to_float(bits) : emu::half_to_float(bits);
        };
        float a[16][16], b[16][8], d[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const int group = lane / 4, pair = 2 * (lane % 4);
            for (int e = 0; e < 2; e++) {
                for (int r = 0; r < 4; r++)
                    a[group + 8 * (r & 1)][pair + e + 8 * (r >> 1)] = value(lanes[lane]->a[r], e);
                for (int r = 0; r < 2; r++) b[pair + e + 8 * r][group] = value(lanes[lane]->b[r], e);
                for (int r = 0; r < 2; r++) d[group + 8 * r][pair + e] = lanes[lane]->d[2 * r + e];
            }
        }
        for (int m = 0; m < 16; m++) {
            for (int k = 0; k < 16; k++) {
                for (int n = 0; n < 8; n++) d[m][n] += a[m][k] * b[k][n];
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            const int group = lane / 4, pair = 2 * (lane % 4);
            for (int e = 0; e < 4; e++) lanes[lane]->d[e] = d[group + 8 * (e >> 1)][pair + (e & 1)];
        }
    });
}

template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void *row) {
    struct In {
        uint16_t elements[8];
        const void *row;
        uint32_t *registers;
    } in;
    if (reinterpret_cast<uintptr_t>(row) % 16) emu::fail("ldmatrix: misaligned row address");
    for (int i = 0; i < 8; i++)
        in.elements[i] = static_cast<const uint16_t *>(row)[i];  // a lane reads the row it names
    in.row = row, in.registers = registers;
    int none;
    emu::collective(kFullWarp, kTranspose ? "ldmatrix.x4.trans" : "ldmatrix.x4", in, none, [](auto lanes, auto) {
        emu::count(emu::counters.matrix_loads);
        for (int m = 0; m < 4; m++) {
            unsigned banks = 0;  // of 16 bytes
            for (int i = 0; i < 8; i++) {
                const unsigned bank = 1u << (reinterpret_cast<uintptr_t>(lanes[8 * m + i]->row) / 16 % 8);
                if (banks & bank) emu::count(emu::counters.bank_conflicts);
                banks |= bank;
            }
            for (int lane = 0; lane < 32; lane++) {
                const int group = lane / 4, pair = 2 * (lane % 4);
                auto element = [&](int row, int column) -> uint32_t {
                    return kTranspose ? lanes[8 * m + column]->elements[row] : lanes[8 * m + row]->elements[column];
                };
                lanes[lane]->registers[m] = element(group, pair) | element(group, pair + 1) << 16;
            }
        }
    });
}

template <LayoutOfB kLayout>
__device__ __forceinline__ void mma_m8n8k4(float (&d0)[4], float (&d1)[4], uint32_t a0, uint32_t a1, uint32_t b0,
                                           uint32_t b1) {
    struct In {
        float *d[2];
        uint32_t a[2], b[2];
    } in{{d0, d1}, {a0, a1}, {b0, b1}};
    int none;
    emu::collective(kFullWarp, "mma.m8n8k4", in, none, [](auto lanes, auto) {
        emu::count(emu::counters.matrix_products);
        auto value = [](const uint32_t *registers, int i) {
            return emu::half_to_float(registers[i / 2] >> (16 * (i % 2)) & 0xFFFF);
        };
        for (int quadpair = 0; quadpair < 4; quadpair++) {
            float a[8][4], b[4][8];
            for (int member = 0; member < 8; member++) {
                const In &lane = *lanes[4 * quadpair + member % 4 + member / 4 * 16];
                for (int i = 0; i < 4; i++) {
                    a[member][i] = value(lane.a, i);
                    if (kLayout == kColumnsOfB) b[i][member] = value(lane.b, i);
                    else b[member % 4][member / 4 * 4 + i] = value(lane.b, i);
                }
            }
            for (int member = 0; member < 8; member++) {
                const In &lane = *lanes[4 * quadpair + member % 4 + member / 4 * 16];
                for (int i = 0; i < 8; i++) {
                    const int row = (member & 1) + (i & 2) + (member & 4);
                    const int column = (member & 2) + (i & 1) + (i & 4);
                    for (int k = 0; k < 4; k++) lane.d[i / 4][i % 4] += a[row][k] * b[k][column];
                }
            }
        }
    });
}

__device__ __forceinline__ void load_shared_16(uint32_t (&registers)[4], const void *from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) emu::fail("16-byte load: misaligned address");
    int none;
    emu::collective(kFullWarp, "16-byte load", from, none, [](auto lanes, auto) {
        emu::count(emu::counters.matrix_loads);
        for (int phase = 0; phase < 32; phase += 8) {
            for (int i = phase; i < phase + 8; i++) {
                for (int j = phase; j < i; j++) {  // lanes that read the same bytes do not conflict
                    const auto one = reinterpret_cast<uintptr_t>(*lanes[i]) / 16;
                    const auto two = reinterpret_cast<uintptr_t>(*lanes[j]) / 16;
                    if (one != two && one % 8 == two % 8) emu::count(emu::counters.bank_conflicts);
                }
            }
        }
    });
    for (int i = 0; i < 4; i++) registers[i] = static_cast<const uint32_t *>(from)[i];
}

__device__ __forceinline__ void copy_async_16(void *to, const void *from, bool valid) {
    emu::async_copy(to, from, 16, valid);
}

__device__ __forceinline__ void copy_async_commit() { emu::async_commit(); }

template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
    emu::async_wait(kGroups);
}

__device__ __forceinline__ char *shared_memory() { return emu::block->shared; }

class DeviceScope {
   public:
    explicit DeviceScope(int) {}
};

template <class Kernel, class... Arguments>
void launch(const char *, Kernel kernel, dim3 grid, int threads, int shared_bytes, void *, Arguments... arguments) {
    emu::launch(grid, dim3(threads), shared_bytes, [=] { kernel(arguments...); });
}

}  // namespace caco
