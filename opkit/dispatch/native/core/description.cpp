#include "description.h"

#include "arguments.h"

#include <torch/csrc/Exceptions.h>

#include <algorithm>

namespace opkit_core {
namespace {

// Reads attributes of what Python describes an op with; throws with Python's error set.
class Reader {
 public:
  explicit Reader(PyObject* object) : object_(object) {}

  Ref get(const char* name) const { return checked_ref(PyObject_GetAttrString(object_, name)); }
  std::string text(const char* name) const {
    const Ref found = get(name);
    const char* characters = PyUnicode_AsUTF8(found.get());
    if (characters == nullptr) { throw_python_error(); }
    return characters;
  }
  int64_t number(const char* name) const { return number(get(name).get()); }
  bool truth(const char* name) const { return PyObject_IsTrue(get(name).get()) == 1; }
  template <typename F>
  void each(const char* name, F visit) const {
    const Ref items = get(name);
    each(items.get(), visit);
  }
  template <typename F>
  static void each(PyObject* items, F visit) {
    const Ref list = checked_ref(PySequence_Fast(items, "expected a sequence"));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list.get()); ++i) {
      visit(PySequence_Fast_GET_ITEM(list.get(), i));
    }
  }
  static int64_t number(PyObject* object) {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred() != nullptr) { throw_python_error(); }
    return value;
  }

 private:
  PyObject* object_;
};

Dim read_dim(PyObject* object) {
  const Reader reader(object);
  Dim dim{static_cast<Dim::Kind>(reader.number("kind")), reader.number("value")};
  reader.each("code", [&](PyObject* one) { dim.code.push_back(Reader::number(one)); });
  return dim;
}

Entry read_entry(PyObject* object) {
  const Reader reader(object);
  Entry entry{static_cast<size_t>(reader.number("place"))};
  reader.each("dims", [&](PyObject* one) {
    entry.dims.push_back(read_dim(one));
    if (entry.dims.back().kind == Dim::Star) {
      entry.star = static_cast<int64_t>(entry.dims.size()) - 1;
    }
  });
  entry.dtype.kind = static_cast<DtypeRule::Kind>(reader.number("dtype_kind"));
  const Ref value = reader.get("dtype_value");
  entry.dtype.value = entry.dtype.kind == DtypeRule::Fixed
                          ? static_cast<int64_t>(dtype_of(value.get()))
                          : Reader::number(value.get());
  reader.each("allowed", [&](PyObject* one) { entry.allowed.push_back(dtype_of(one)); });
  return entry;
}

// Whether two entries bind the same names to the same sizes.
bool is_same(const Entry& one, const Entry& other) {
  return std::equal(one.dims.begin(), one.dims.end(), other.dims.begin(), other.dims.end(),
                    [](const Dim& a, const Dim& b) {
                      const bool fixed = a.kind == Dim::Name || a.kind == Dim::Number ||
                                         (a.kind == Dim::Star && a.value >= 0);
                      return fixed && a.kind == b.kind && a.value == b.value;
                    });
}

Plan read_plan(PyObject* object) {
  const Reader reader(object);
  Plan plan;
  reader.each("inputs", [&](PyObject* one) { plan.inputs.push_back(read_entry(one)); });
  for (size_t i = 0; i < plan.inputs.size(); ++i) {
    const Entry& entry = plan.inputs[i];
    const auto end = plan.inputs.begin() + static_cast<std::ptrdiff_t>(i);
    const auto same = std::find_if(plan.inputs.begin(), end,
                                   [&](const Entry& other) { return is_same(other, entry); });
    if (same == end || !entry.allowed.empty()) {
      plan.binding.push_back(i);
    } else {
      Alike* last = plan.alike.empty() ? nullptr : &plan.alike.back();
      if (last != nullptr && last->earlier == same->place &&
          last->first + last->count == entry.place && last->input + last->count == i) {
        ++last->count;
      } else {
        plan.alike.push_back({same->place, entry.place, i, 1});
      }
    }
  }
  for (const Entry& entry : plan.inputs) {
    plan.late = plan.late || entry.dtype.kind != DtypeRule::None;
    for (const Dim& dim : entry.dims) { plan.late = plan.late || dim.kind == Dim::Expression; }
  }
  reader.each("outputs", [&](PyObject* one) { plan.outputs.push_back(read_entry(one)); });
  reader.each("ints", [&](PyObject* one) {
    plan.ints.emplace_back(Reader::number(PyTuple_GET_ITEM(one, 0)),
                           Reader::number(PyTuple_GET_ITEM(one, 1)));
  });
  plan.names = static_cast<size_t>(reader.number("names"));
  plan.stars = static_cast<size_t>(reader.number("stars"));
  return plan;
}

}  // namespace

std::shared_ptr<Record> read_record(PyObject* object) {
  const Reader reader(object);
  auto record = std::make_shared<Record>(
      c10::Dispatcher::singleton().findSchemaOrThrow(reader.text("torch_name").c_str(), ""));
  record->name = reader.text("name");
  record->positional = static_cast<size_t>(reader.number("positional"));
  record->mutates = false;
  record->contiguous = reader.truth("contiguous");
  record->tensor_lists = false;
  record->plain_results = true;
  reader.each("params", [&](PyObject* one) {
    const Reader param(one);
    Ref fallback = param.truth("required") ? Ref() : param.get("default");
    PyObject* name = param.get("name").release();
    PyUnicode_InternInPlace(&name);  // as the names in calls are
    record->params.push_back({Ref::steal(name), std::move(fallback),
                              static_cast<Kind>(param.number("kind")), param.truth("list"),
                              param.truth("optional"), param.truth("mutated"),
                              param.number("length")});
    const Param& last = record->params.back();
    record->mutates = record->mutates || last.mutated;
    record->tensor_lists = record->tensor_lists || (last.list && last.kind == Kind::Tensor);
  });
  reader.each("results", [&](PyObject* one) {
    const Reader result(one);
    record->results.push_back(
        {static_cast<Kind>(result.number("kind")), result.truth("list"), result.truth("optional")});
    const Result& last = record->results.back();
    record->tensor_lists = record->tensor_lists || last.list;
    record->plain_results =
        record->plain_results && last.kind == Kind::Tensor && !last.list && !last.optional;
  });
  const Ref plan = reader.get("plan");
  if (plan.given()) { record->plan = read_plan(plan.get()); }
  record->keywords = reader.get("keywords");
  record->container = reader.get("container");
  record->is_tuple = reader.truth("is_tuple");
  record->choose = reader.get("choose");
  record->run = reader.get("run");
  record->expect = reader.get("expect");
  record->conform = reader.get("conform");
  record->explain = reader.get("explain");
  record->pack = reader.get("pack");
  const Ref derivation = reader.get("derivation");
  const Reader derived(derivation.get());
  record->node_name = derived.text("node_name");
  record->twin = derived.get("twin");
  record->lost = derived.get("lost");
  record->tracked = derived.get("tracked");
  record->again = derived.get("again");
  record->alone = derived.get("alone");
  record->check = derived.get("check");
  record->flatten = derived.get("flatten");
  record->set_formula(read_formula(reader.get("formula").get()));
  return record;
}

std::shared_ptr<const Formula> read_formula(PyObject* object) {
  const Reader reader(object);
  auto formula = std::make_shared<Formula>();
  formula->form = static_cast<Formula::Form>(reader.number("form"));
  formula->settled = reader.truth("settled");
  reader.each("constant",
              [&](PyObject* one) { formula->constant.push_back(PyObject_IsTrue(one) == 1); });
  if (formula->form == Formula::Function) {
    formula->setup = reader.get("setup");
    formula->backward = reader.get("backward");
    formula->counted = reader.get("counted");
  } else if (formula->form == Formula::Rule) {
    formula->save = reader.get("save");
    formula->gradients = reader.get("gradients");
  } else {
    formula->op = {reader.text("op"), ""};
    if (!c10::Dispatcher::singleton().findSchema(formula->op)) {  // removed: the rule says so
      return read_formula(reader.get("rule").get());
    }
    reader.each("saves", [&](PyObject* one) {
      formula->saves.emplace_back(PyObject_IsTrue(PyTuple_GET_ITEM(one, 0)) == 1,
                                  Reader::number(PyTuple_GET_ITEM(one, 1)));
    });
    reader.each("outputs", [&](PyObject* one) { formula->outputs.push_back(Reader::number(one)); });
    reader.each("arguments",
                [&](PyObject* one) { formula->arguments.push_back(Reader::number(one)); });
    reader.each("lost", [&](PyObject* one) { formula->lost.push_back(Reader::number(one)); });
    formula->rule = read_formula(reader.get("rule").get());
    formula->object = reader.get("object");
  }
  return formula;
}

}  // namespace opkit_core
