// Threads of a library: named, and deaf to signals, which are for the threads of whoever embeds us.
#pragma once

#include <pthread.h>

#include <csignal>
#include <functional>
#include <thread>
#include <utility>

namespace stoker {

/// name: at most 15 characters. Throws std::system_error.
inline std::thread start_thread(const char* name, std::function<void()> body) {
    sigset_t all;
    sigset_t before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);  // a thread inherits the mask of the one that starts it
    struct Restore {
        const sigset_t& mask;
        ~Restore() { ::pthread_sigmask(SIG_SETMASK, &mask, nullptr); }
    } restore{before};
    return std::thread([name, body = std::move(body)] {
        ::pthread_setname_np(::pthread_self(), name);
        body();
    });
}

}  // namespace stoker
