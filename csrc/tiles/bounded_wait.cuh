// A build with CACO_BOUNDED_WAIT shows where a launch for sm_90a hangs. A thread that waits too long for an mbarrier
// writes down where it is and ends the launch; the host prints that. For debugging, not for timing: every launch waits.
//
// The note is in memory of the host, which outlives the launch. printf in a kernel would take more registers than a
// copying thread has, so that ptxas leaves out setmaxnreg, and a hang of it would be gone. As it is, setmaxnreg and all
// waits are those of the usual build; products run one after the other (ptxas: C7512), and some registers spill.
#pragma once
#include <cstdio>

namespace caco {

struct Note {
    unsigned given_up, block_x, block_y, thread, barrier, parity;
};

static __device__ Note *note_of_waiting;  // one for each source

// Of tries that never sleep this many take a second or two.
constexpr int kMostTries = 1 << 26;

__device__ __forceinline__ void give_up(uint32_t barrier, unsigned parity) {
    volatile Note *note = note_of_waiting;
    note->block_x = blockIdx.x, note->block_y = blockIdx.y, note->thread = threadIdx.x;
    note->barrier = barrier, note->parity = parity, note->given_up = 1;
    __threadfence_system();
    __trap();
}

// The note that this source's kernels write to.
inline Note *open_note() {
    Note *note = nullptr, *on_device = nullptr;
    cudaHostAlloc(&note, sizeof(Note), cudaHostAllocMapped);
    *note = Note{};
    cudaHostGetDevicePointer(&on_device, note, 0);
    cudaMemcpyToSymbol(note_of_waiting, &on_device, sizeof(on_device));
    return note;
}

// Waits for the launch, and says where it hung.
inline cudaError_t finish(const char *name, const Note *note) {
    const cudaError_t status = cudaDeviceSynchronize();
    if (note->given_up) {
        std::printf("waited too long: %s, block %u %u, thread %u, barrier at byte %u of shared memory, parity %u\n",
                    name, note->block_x, note->block_y, note->thread, note->barrier, note->parity);
        std::fflush(stdout);
    }
    return status;
}

}  // namespace caco
