// A fiber: a call stack of its own on which one emulated CUDA thread runs until it has to wait.
//
// Switching is a handful of pushes and pops (x86-64, System V). AddressSanitizer and ThreadSanitizer are told of every
// switch; to ThreadSanitizer each fiber is a thread of its own and a switch orders nothing, so that only what orders
// memory on the device (barriers) orders it here, and a missing barrier is a reported race.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "the emulation of CUDA on the CPU needs x86-64 and g++ or clang"
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void *__tsan_get_current_fiber();
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *fiber);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *address);
void __tsan_release(void *address);
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
}
#define EMU_TSAN(...) __VA_ARGS__
#else
#define EMU_TSAN(...)
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void **fake_stack_save, const void *bottom, size_t size);
void __sanitizer_finish_switch_fiber(void *fake_stack_save, const void **bottom_old, size_t *size_old);
}
#define EMU_ASAN(...) __VA_ARGS__
#else
#define EMU_ASAN(...)
#endif

namespace emu {

constexpr size_t kStackBytes = 192 << 10;

// While one lives, memory accesses are the emulator's own bookkeeping and not the kernel's.
struct Bookkeeping {
    Bookkeeping() { EMU_TSAN(AnnotateIgnoreReadsBegin(__FILE__, 0); AnnotateIgnoreWritesBegin(__FILE__, 0);) }
    ~Bookkeeping() { EMU_TSAN(AnnotateIgnoreWritesEnd(__FILE__, 0); AnnotateIgnoreReadsEnd(__FILE__, 0);) }
};

inline void order_release(void *address) {
    (void)address;
    EMU_TSAN(__tsan_release(address);)
}
inline void order_acquire(void *address) {
    (void)address;
    EMU_TSAN(__tsan_acquire(address);)
}

__attribute__((naked, noinline, used)) inline void swap_stacks(void **save, void *load) {
    (void)save, (void)load;
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

// The stack that a block's scheduler runs on; fibers return to it.
struct HomeStack {
    void *pointer = nullptr;
    void *tsan = nullptr;
    void *fake_stack = nullptr;  // AddressSanitizer's shadow frames of the scheduler
    const void *bottom = nullptr;
    size_t size = 0;
};

class Fiber {
   public:
    void start_at(void (*entry)()) {
        memory_.reset(new char[kStackBytes]);
        uintptr_t top = (reinterpret_cast<uintptr_t>(memory_.get()) + kStackBytes) & ~uintptr_t(63);
        void **frame = reinterpret_cast<void **>(top - 16);
        frame[0] = reinterpret_cast<void *>(entry);  // the address that swap_stacks returns to
        frame[1] = nullptr;
        pointer_ = frame - 6;  // six callee-saved registers
        std::memset(pointer_, 0, 6 * sizeof(void *));
        EMU_TSAN(tsan_ = __tsan_create_fiber(0);)
    }
    void destroy() { EMU_TSAN(__tsan_destroy_fiber(tsan_);) }

    // Scheduler -> fiber; returns when the fiber calls leave().
    __attribute__((noinline)) void enter(HomeStack &home) {
        EMU_TSAN(__tsan_switch_to_fiber(tsan_, 1);)
        EMU_ASAN(__sanitizer_start_switch_fiber(&home.fake_stack, memory_.get(), kStackBytes);)
        swap_stacks(&home.pointer, pointer_);
        EMU_ASAN(__sanitizer_finish_switch_fiber(home.fake_stack, nullptr, nullptr);)
    }
    // The first thing that the entry function calls.
    void entered(HomeStack &home) {
        (void)home;
        EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &home.bottom, &home.size);)
    }
    // Fiber -> scheduler; `for_good` when the fiber never runs again: what the scheduler does later comes after all of
    // it.
    __attribute__((noinline)) void leave(HomeStack &home, bool for_good) {
        (void)for_good;
        EMU_TSAN(__tsan_switch_to_fiber(home.tsan, for_good ? 0 : 1);)
        EMU_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, home.bottom, home.size);)
        swap_stacks(&pointer_, home.pointer);
        EMU_ASAN(__sanitizer_finish_switch_fiber(fake_stack_, &home.bottom, &home.size);)
    }

   private:
    std::unique_ptr<char[]> memory_;
    void *pointer_ = nullptr;
    void *tsan_ = nullptr;
    void *fake_stack_ = nullptr;
};

}  // namespace emu
