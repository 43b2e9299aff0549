// Checks the rules of a completion and its tokens once, then draws for all rows of a step without Python's
// lock.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/thread_pool.h"
#include "kernels/array_arguments.h"
#include "kernels/dispatch.h"
#include "sampler/philox.h"
#include "sampler/sampler.h"

namespace tsqp {
namespace {

using Tokens = std::vector<std::int32_t>;

void need_tokens(const char* name, std::span<const std::int32_t> tokens, std::size_t vocab_size) {
    check_indices(name, tokens.data(), tokens.size(), vocab_size);
}

TokenSampler make_sampler(Index vocab_size, const Tokens& prompt, double temperature, std::size_t top_k,
                          double top_p, double min_p, double repetition_penalty, double presence_penalty,
                          double frequency_penalty, std::uint64_t seed, std::uint64_t stream, Tokens allowed,
                          std::vector<std::pair<std::int32_t, double>> bias, std::vector<Tokens> bad_words,
                          std::size_t min_tokens, Tokens ending) {
    const std::size_t size = not_negative("vocab_size", vocab_size);
    if (size == 0 || size > std::size_t{INT32_MAX})
        throw py::value_error("vocab_size: expected 1 to 2^31 - 1");
    const auto need = [](bool holds, const char* what) {
        if (!holds) throw py::value_error(what);
    };
    need(temperature >= 0.0, "temperature: expected 0 or more");
    need(top_p > 0.0 && top_p <= 1.0, "top_p: expected more than 0, at most 1");
    need(min_p >= 0.0 && min_p <= 1.0, "min_p: expected 0 to 1");
    need(repetition_penalty > 0.0, "repetition_penalty: expected more than 0");
    need(std::is_sorted(allowed.begin(), allowed.end(), std::less_equal<>()),
         "allowed: expected ascending tokens");
    need_tokens("prompt", prompt, size);
    need_tokens("allowed", allowed, size);
    need_tokens("ending", ending, size);
    for (const auto& [token, value] : bias) need_tokens("bias", {&token, 1}, size);
    for (const Tokens& words : bad_words) {
        need(!words.empty(), "bad_words: expected tokens");
        need_tokens("bad_words", words, size);
    }
    return TokenSampler(
        {temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed,
         stream, std::move(allowed), std::move(bias), std::move(bad_words), min_tokens, std::move(ending)},
        size, prompt);
}

// Row by row, on all threads. body(scratch, row).
template <class Body>
void for_each_row(std::size_t rows, const Body& body) {
    static thread_local SamplingScratch scratch;
    parallel_rows(rows, 1, get_num_threads(), [&](std::size_t, std::size_t begin, std::size_t end) {
        for (std::size_t row = begin; row < end; ++row) body(scratch, row);
    });
}

// Row i is drawn from by sampler i. A sampler may be grown only when this has returned.
py::array_t<std::int32_t> draw_tokens(const py::array& logits,
                                      const std::vector<const TokenSampler*>& samplers) {
    const auto rows = static_cast<Index>(samplers.size());
    const std::size_t vocab_size = logits.ndim() == 2 ? static_cast<std::size_t>(logits.shape(1)) : 0;
    const float* values = data_of<const float>(logits, "logits", {rows, -1});
    for (const TokenSampler* sampler : samplers) {
        // None becomes a null pointer.
        if (sampler == nullptr) throw py::type_error("samplers: expected a TokenSampler for each row");
        if (sampler->vocab_size() != vocab_size)
            throw py::value_error("logits: expected rows of " + std::to_string(sampler->vocab_size()));
    }
    const KernelTable& kernels = active_kernels();
    py::array_t<std::int32_t> tokens(rows);
    std::int32_t* drawn = tokens.mutable_data();
    {
        const py::gil_scoped_release unlocked;
        for_each_row(samplers.size(), [&](SamplingScratch& scratch, std::size_t row) {
            drawn[row] = samplers[row]->draw(values + row * vocab_size, kernels, scratch);
        });
    }
    return tokens;
}

// For each row of logits [R, V] and its token: log probability, rank, and the `top` likeliest tokens with
// theirs.
py::tuple score_tokens(const py::array& logits, const py::array& tokens, Index top) {
    const float* values = data_of<const float>(logits, "logits", {-1, -1});
    const auto rows = static_cast<std::size_t>(logits.shape(0)),
               size = static_cast<std::size_t>(logits.shape(1));
    const std::size_t count = not_negative("top", top);
    if (count > size) throw py::value_error("top: expected at most " + std::to_string(size));
    const std::int32_t* scored = data_of<const std::int32_t>(tokens, "tokens", {logits.shape(0)});
    check_indices("tokens", scored, rows, size);
    const KernelTable& kernels = active_kernels();
    py::array_t<float> logprobs(logits.shape(0)), top_logprobs({logits.shape(0), top});
    py::array_t<std::int32_t> ranks(logits.shape(0)), top_tokens({logits.shape(0), top});
    float *to_logprobs = logprobs.mutable_data(), *to_top_logprobs = top_logprobs.mutable_data();
    std::int32_t *to_ranks = ranks.mutable_data(), *to_top_tokens = top_tokens.mutable_data();
    std::atomic<bool> are_finite{true};
    {
        const py::gil_scoped_release unlocked;
        for_each_row(rows, [&](SamplingScratch& scratch, std::size_t row) {
            TokenScore found{};
            if (!score(values + row * size, size, scored[row], count, kernels, scratch, found,
                       to_top_tokens + row * count, to_top_logprobs + row * count))
                are_finite = false;
            to_logprobs[row] = found.logprob;
            to_ranks[row] = found.rank;
        });
    }
    if (!are_finite) throw py::value_error("logits: expected finite numbers");
    return py::make_tuple(logprobs, ranks, top_tokens, top_logprobs);
}

}  // namespace

void bind_sampler(py::module_& module) {
    using namespace py::literals;
    py::class_<TokenSampler>(module, "TokenSampler")
        .def(py::init(&make_sampler), "vocab_size"_a, "prompt"_a, py::kw_only(), "temperature"_a = 0.0,
             "top_k"_a = 0, "top_p"_a = 1.0, "min_p"_a = 0.0, "repetition_penalty"_a = 1.0,
             "presence_penalty"_a = 0.0, "frequency_penalty"_a = 0.0, "seed"_a = 0, "stream"_a = 0,
             "allowed"_a = Tokens(), "bias"_a = std::vector<std::pair<std::int32_t, double>>(),
             "bad_words"_a = std::vector<Tokens>(), "min_tokens"_a = 0, "ending"_a = Tokens())
        .def_property_readonly("position", &TokenSampler::position)
        .def(
            "grow",
            [](TokenSampler& sampler, std::int32_t token) {
                need_tokens("token", {&token, 1}, sampler.vocab_size());
                sampler.grow(token);
            },
            "token"_a);
    module.attr("NOT_FINITE") = TokenSampler::kNotFinite;
    module.attr("NOTHING_LEFT") = TokenSampler::kNothingLeft;
    module.def("draw_tokens", draw_tokens, "logits"_a, "samplers"_a);
    module.def("score_tokens", score_tokens, "logits"_a, "tokens"_a, "top"_a = 0);
    module.def("philox", philox, "key"_a, "counter"_a);
}

}  // namespace tsqp
