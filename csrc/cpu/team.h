// The threads of a call. Include only in files compiled once.
#pragma once

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "params.h"

namespace pacl {
namespace {

// Threads that run the same program and meet after each phase.
class Team {
 public:
  template <class Program>
  Team(const OpenMp& openmp, int threads, Program program) {
    if (openmp.parallel && threads > 1)
      borrow(openmp, threads, program);
    else
      start(threads, program);
  }

  // Calls task(i) once for each i < count, spread over the threads; returns when all are done.
  template <class Task>
  void phase(int64_t count, Task task) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
    meet();
  }

 private:
  template <class Program>
  void start(int threads, Program& program) {
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
      while ((int)others.size() < threads - 1)
        others.emplace_back([this, program, id = (int)others.size() + 1] {
          started_.wait(0);
          program(*this, id);
        });
    } catch (const std::system_error&) {  // no more threads available: fewer do the same work
    }
    begin((int)others.size() + 1);
    program(*this, 0);
    for (auto& thread : others) thread.join();
  }

  template <class Program>
  void borrow(const OpenMp& openmp, int threads, Program& program) {
    struct Job {
      Team* team;
      const OpenMp* openmp;
      Program* program;
    } job{this, &openmp, &program};
    openmp.parallel(
        [](void* data) {
          const Job& job = *(const Job*)data;
          const int id = job.openmp->thread_num();
          if (id == 0)
            job.team->begin(job.openmp->num_threads());  // may be fewer than requested
          else
            job.team->started_.wait(0);
          (*job.program)(*job.team, id);
        },
        &job, threads, 0);
  }

  void begin(int size) {
    size_ = size;
    started_ = 1;
    started_.notify_all();
  }

  void meet() {
    const int round = round_.load();
    if (arrived_.fetch_add(1) + 1 == size_) {
      next_ = 0;
      arrived_ = 0;
      round_ = round + 1;
      round_.notify_all();
      return;
    }
    for (int spin = 0; spin < 2000; ++spin)  // phases are short, so spin for a while before sleeping
      if (round_.load(std::memory_order_acquire) != round) return;
    round_.wait(round);
  }

  std::atomic<int> started_{0}, arrived_{0}, round_{0};
  std::atomic<int64_t> next_{0};
  int size_ = 1;
};

}  // namespace
}  // namespace pacl
