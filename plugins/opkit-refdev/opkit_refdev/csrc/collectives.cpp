// Collectives between devices of several processes: those of a backend of the CPU, on the same memory.
#include "collectives.h"

#include "refdev.h"

namespace refdev {
namespace {

using Tensors = std::vector<at::Tensor>;
using Lists = std::vector<Tensors>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

Tensors on_host_all(const Tensors& tensors) {
  Tensors host;
  for (const auto& tensor : tensors) host.push_back(on_host(tensor));
  return host;
}

Lists on_host_all(const Lists& lists) {
  Lists host;
  for (const auto& tensors : lists) host.push_back(on_host_all(tensors));
  return host;
}

Tensors flat(const Lists& lists) {
  Tensors all;
  for (const auto& tensors : lists) all.insert(all.end(), tensors.begin(), tensors.end());
  return all;
}

// Work of the host's backend, whose results are the device's tensors.
class DeviceWork final : public c10d::Work {
 public:
  DeviceWork(WorkPtr inner, Tensors results)
      : inner_(std::move(inner)), results_(std::move(results)) {}

  bool isCompleted() override { return inner_->isCompleted(); }
  bool isSuccess() const override { return inner_->isSuccess(); }
  std::exception_ptr exception() const override { return inner_->exception(); }
  int sourceRank() const override { return inner_->sourceRank(); }
  std::vector<at::Tensor> result() override { return results_; }
  void synchronize() override { inner_->wait(); }
  bool wait(std::chrono::milliseconds timeout) override { return inner_->wait(timeout); }
  void abort() override { inner_->abort(); }

  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    return inner_->getFuture()->then(
        [results = results_](c10::ivalue::Future& done) {
          done.value();  // raises what the work raised
          return c10::IValue(results);
        },
        c10::ListType::create(c10::TensorType::get()));
  }

 private:
  WorkPtr inner_;
  Tensors results_;
};

class Collectives final : public c10d::Backend {
 public:
  explicit Collectives(c10::intrusive_ptr<c10d::Backend> inner)
      : Backend(inner->getRank(), inner->getSize()), inner_(std::move(inner)) {}

  const std::string getBackendName() const override { return "refdev"; }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto host = on_host_all(tensors);
    return of(inner_->broadcast(host, options), tensors);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto host = on_host_all(tensors);
    return of(inner_->allreduce(host, options), tensors);
  }
  WorkPtr allreduce_coalesced(Tensors& tensors,
                              const c10d::AllreduceCoalescedOptions& options) override {
    auto host = on_host_all(tensors);
    return of(inner_->allreduce_coalesced(host, options), tensors);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto host = on_host_all(tensors);
    return of(inner_->reduce(host, options), tensors);
  }
  WorkPtr allgather(Lists& outputs, Tensors& inputs,
                    const c10d::AllgatherOptions& options) override {
    auto to = on_host_all(outputs);
    auto from = on_host_all(inputs);
    return of(inner_->allgather(to, from, options), flat(outputs));
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input,
                          const c10d::AllgatherOptions& options) override {
    auto to = on_host(output);
    auto from = on_host(input);
    return of(inner_->_allgather_base(to, from, options), {output});
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override {
    auto to = on_host_all(outputs);
    auto from = on_host_all(inputs);
    return of(inner_->allgather_into_tensor_coalesced(to, from, options), outputs);
  }
  WorkPtr gather(Lists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto to = on_host_all(outputs);
    auto from = on_host_all(inputs);
    return of(inner_->gather(to, from, options), flat(outputs));
  }
  WorkPtr scatter(Tensors& outputs, Lists& inputs, const c10d::ScatterOptions& options) override {
    auto to = on_host_all(outputs);
    auto from = on_host_all(inputs);
    return of(inner_->scatter(to, from, options), outputs);
  }
  WorkPtr reduce_scatter(Tensors& outputs, Lists& inputs,
                         const c10d::ReduceScatterOptions& options) override {
    auto to = on_host_all(outputs);
    auto from = on_host_all(inputs);
    return of(inner_->reduce_scatter(to, from, options), outputs);
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    auto to = on_host(output);
    auto from = on_host(input);
    return of(inner_->_reduce_scatter_base(to, from, options), {output});
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override {
    auto to = on_host_all(outputs);
    auto from = on_host_all(inputs);
    return of(inner_->reduce_scatter_tensor_coalesced(to, from, options), outputs);
  }
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_sizes,
                        std::vector<int64_t>& input_sizes,
                        const c10d::AllToAllOptions& options) override {
    auto to = on_host(output);
    auto from = on_host(input);
    return of(inner_->alltoall_base(to, from, output_sizes, input_sizes, options), {output});
  }
  WorkPtr send(Tensors& tensors, int to, int tag) override {
    auto host = on_host_all(tensors);
    return of(inner_->send(host, to, tag), tensors);
  }
  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    auto host = on_host_all(tensors);
    return of(inner_->recv(host, from, tag), tensors);
  }
  WorkPtr recvAnysource(Tensors& tensors, int tag) override {
    auto host = on_host_all(tensors);
    return of(inner_->recvAnysource(host, tag), tensors);
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override { return inner_->barrier(options); }
  void setSequenceNumberForGroup() override { inner_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner_->getSequenceNumberForGroup(); }
  void setTimeout(std::chrono::milliseconds timeout) override { inner_->setTimeout(timeout); }

 private:
  static WorkPtr of(WorkPtr inner, Tensors results) {
    return c10::make_intrusive<DeviceWork>(std::move(inner), std::move(results));
  }

  c10::intrusive_ptr<c10d::Backend> inner_;
};

}  // namespace

c10::intrusive_ptr<c10d::Backend> collectives_over(c10::intrusive_ptr<c10d::Backend> host) {
  return c10::make_intrusive<Collectives>(std::move(host));
}

}  // namespace refdev
