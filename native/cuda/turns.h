// The steps of one process on one device take turns. Blocks of the streaming matrix kernel, of attention beside it and of the prefill
// matrix kernel wait for other blocks of their own launch or of the one before it: those must find room on the device, which they would not
// for as long as blocks of another stream's step hold it and wait for theirs. Kernels that wait for none (loading, copies) run at any time.
// A step on several devices, whose ranks wait for each other, takes the turns of all of them under several(): two such steps are in one order
// everywhere, and a step on one device waits for none elsewhere, so that no circle of them can wait.
// Processes have the device in time slices, whole, so they need no turns; under MPS they share it, which engines of two must not.
#pragma once
#include <cuda_runtime.h>

#include <memory>
#include <mutex>

namespace codefuse::cuda {

class Turns {
 public:
  static std::shared_ptr<Turns> of(int device);  // the same for everybody in this process

  // While it lives nobody else has a turn. What its stream is given runs after all that other streams were given in theirs; a stream that
  // is alone on its device waits for nothing.
  class Turn {
   public:
    Turn(Turns& turns, cudaStream_t stream, cudaEvent_t ended);  // ended: recorded at its end; must live until leave()
    void end();  // records it; DeviceError
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Turns& turns_;
    std::lock_guard<std::mutex> lock_;
    const cudaStream_t stream_;
    const cudaEvent_t ended_;
    bool recorded_ = false;
  };

  // Held while a step is launched on several devices, and by what waits for a device in the driver (freeing memory), for which such a step must
  // either have been launched everywhere or nowhere.
  static std::unique_lock<std::mutex> several();

  void leave(cudaStream_t stream);  // all of its work has ended

 private:
  std::mutex mutex_;
  cudaStream_t stream_ = nullptr;  // of the last turn, and when that ends; nullptr: it has ended
  cudaEvent_t ended_ = nullptr;
};

}  // namespace codefuse::cuda
