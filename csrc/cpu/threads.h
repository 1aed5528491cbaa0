// Work shared out over the threads that the process has already.
//
// torch's OpenMP threads spin for a while after their last task, so threads of our own would compete with them for the
// cores; they are asked to do the work instead. Linking to a runtime would bring a second one, with its own spinning
// threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <string>
#include <type_traits>
#include <vector>

namespace bandit_rft::cpu {

// Uses the OpenMP runtime of this name if the process has loaded it; whether one is in use now.
bool use_openmp(const std::string& library);

// member(data, index, size) on `count` threads at once, or on as many as the runtime grants; they know by `size`.
void run_team(int count, void (*member)(void* data, int index, int size), void* data);

template <class Member>
void run_team(int count, Member& member) {
    run_team(count, [](void* data, int index, int size) { (*static_cast<Member*>(data))(index, size); }, &member);
}

// Where the members of a team wait for each other; they are expected within microseconds.
class Barrier {
  public:
    void wait(int size);

  private:
    std::atomic<int> waiting_{0}, phase_{0};
};

// Logits, at about a nanosecond each, that are worth another thread: asking one of OpenMP's costs a few microseconds,
// starting one about 30.
int64_t worth_a_thread();

// Runs work(begin, end) on [0, count), cut at multiples of `grain`, on at most `threads` threads of `elements` logits.
template <class Work>
void parallel(int64_t count, int64_t grain, int64_t elements, int threads, const Work& work) {
    const int64_t worthwhile = elements / worth_a_thread();
    const int64_t pieces = (count + grain - 1) / grain;
    const int64_t used = std::max<int64_t>(1, std::min<int64_t>({int64_t(threads), pieces, worthwhile}));
    const auto bound = [&](int64_t i) { return std::min(count, pieces * i / used * grain); };
    if (used == 1) return work(int64_t(0), count);
    std::vector<std::exception_ptr> errors(static_cast<size_t>(used));
    auto member = [&](int index, int size) {
        for (int64_t i = index; i < used; i += size) try {
                work(bound(i), bound(i + 1));
            } catch (...) {
                errors[size_t(i)] = std::current_exception();
            }
    };
    run_team(int(used), member);
    for (const auto& error : errors)
        if (error) std::rethrow_exception(error);
}

}  // namespace bandit_rft::cpu
