// A test is a TEST(what_must_hold) { CHECK(...); }. Included once per program: it brings main().
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <vector>

namespace check {

inline std::atomic<int> failures{0};

struct Test {
    const char* name;
    void (*run)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

struct Registration {
    Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline void fail(const char* file, int line, const char* what) {
    ++failures;
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
}

/// Run `body` in a forked child. The child's wait status: 0 if every CHECK of it held.
inline int status_of_child(const std::function<void()>& body) {
    const pid_t child = ::fork();
    if (child == 0) {
        const int before = failures;
        try {
            body();
        } catch (const std::exception& error) {
            fail(__FILE__, __LINE__, error.what());
        }
        ::_exit(failures == before ? 0 : 1);
    }
    int status = -1;
    ::waitpid(child, &status, 0);
    return status;
}

}  // namespace check

#define TEST(name)                                                  \
    static void name();                                             \
    static const check::Registration name##_registered(#name, name); \
    static void name()

/// Counts a failure and goes on. From any thread.
#define CHECK(condition)                                            \
    do {                                                            \
        if (!(condition)) check::fail(__FILE__, __LINE__, #condition); \
    } while (false)

#define CHECK_THROWS(type, expression)                                                  \
    do {                                                                                \
        bool thrown = false;                                                            \
        try {                                                                           \
            (void)(expression);                                                         \
        } catch (const type&) {                                                         \
            thrown = true;                                                              \
        }                                                                               \
        if (!thrown) check::fail(__FILE__, __LINE__, #expression " does not throw " #type); \
    } while (false)

/// Ends the test: this machine cannot show it.
#define SKIP(reason)                                     \
    do {                                                 \
        std::fprintf(stderr, "  skipped: %s\n", reason); \
        return;                                          \
    } while (false)

/// Arguments: names of tests to run; none: all.
int main(int count, char** names) {
    ::alarm(110);  // a hang is a failure
    for (const check::Test& test : check::tests()) {
        bool wanted = count < 2;
        for (int i = 1; i < count; ++i) wanted = wanted || std::strcmp(names[i], test.name) == 0;
        if (!wanted) continue;
        std::fprintf(stderr, "%s\n", test.name);
        try {
            test.run();
        } catch (const std::exception& error) {
            check::fail(test.name, 0, error.what());
        }
    }
    if (check::failures > 0) std::fprintf(stderr, "%d failed\n", check::failures.load());
    return check::failures > 0 ? 1 : 0;
}
