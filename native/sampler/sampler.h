// From a row of logits to a token, and to its log probability.
//
// Rows are private memory: whoever calls has copied them out of the arena. Nothing here sorts a vocabulary:
// what a filter keeps is found from the largest logit of each block and from histograms, and a token is drawn
// by walking integer weights (LogitWeightsArgs), whose sums do not depend on their order. So a row's token
// depends on its logits, its rules, its history and its seed, and on nothing else: not on instruction sets,
// threads or the other rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace tsqp {

// What one completion is sampled by. Names and meanings as in vLLM's SamplingParams.
struct SamplingRules {
    double temperature = 0.0;  // 0: the likeliest
    std::size_t top_k = 0;     // 0: all
    double top_p = 1.0;        // in (0, 1]
    double min_p = 0.0;        // in [0, 1]
    double repetition_penalty = 1.0;
    double presence_penalty = 0.0;
    double frequency_penalty = 0.0;
    std::uint64_t seed = 0;
    std::uint64_t stream = 0;                           // which completion of its request
    std::vector<std::int32_t> allowed;                  // ascending, each once; empty: all
    std::vector<std::pair<std::int32_t, double>> bias;  // each token once
    std::vector<std::vector<std::int32_t>> bad_words;   // none of them empty
    std::size_t min_tokens = 0;                         // before so many, `ending` is not drawn
    std::vector<std::int32_t> ending;
};

// Memory of one thread, kept so that nothing is allocated once the largest vocabulary was seen.
struct SamplingScratch {
    struct Candidate {
        float logit;
        std::uint32_t token;
        std::uint32_t weight;
    };
    std::vector<float> edited, maxima, largest;
    std::vector<std::uint32_t> weights;
    std::vector<std::uint64_t> sums;  // of the weights of each block
    std::vector<Candidate> candidates, undecided;
};

// The tokens of one completion: its rules and what it has said so far.
class TokenSampler {
  public:
    static constexpr std::int32_t kNotFinite = -1;    // a logit is a NaN or an infinity
    static constexpr std::int32_t kNothingLeft = -2;  // the rules leave no token

    // SAFETY: every token of rules and prompt lies in [0, vocab_size): bind_sampler.cpp has checked it.
    TokenSampler(SamplingRules rules, std::size_t vocab_size, std::span<const std::int32_t> prompt);

    std::size_t vocab_size() const { return vocab_size_; }
    std::size_t position() const { return output_.size(); }

    // The token at position(), or one of the constants above; it is not taken yet.
    //
    //   Numerics: in this order: allowed tokens, bad words, min_tokens, bias, repetition penalty over prompt
    //   and
    //             output, frequency and presence penalty over the output, each in f32 and held within
    //             +-FLT_MAX; then temperature, min_p, top_k, top_p. Of equal logits that of the smaller token
    //             comes first. The draw is philox(key = {seed, stream}, counter = {position, 0, 0, 0})[0], as
    //             a fraction of 2^64, of the kept weights, tokens in ascending order.
    std::int32_t draw(const float* logits, const KernelTable& kernels, SamplingScratch& scratch) const;

    // Takes a token.
    void grow(std::int32_t token);

  private:
    struct Seen {
        std::int32_t token;
        std::uint32_t count;  // in the output
    };

    bool edits() const;
    void edit(float* logits) const;
    bool ends_with(std::span<const std::int32_t> tokens) const;

    SamplingRules rules_;
    std::size_t vocab_size_;
    std::vector<std::int32_t> output_;
    std::vector<Seen> seen_;                               // only where a penalty asks for it
    std::unordered_map<std::int32_t, std::size_t> place_;  // of a token in seen_
};

// What is told of one position: the log probability of a token by the logits as they are, how many tokens are
// likelier or as likely (itself included), and the likeliest ones.
struct TokenScore {
    float logprob;
    std::int32_t rank;
};

//   Shapes:   logits [vocab_size]; top_tokens, top_logprobs [top]; top <= vocab_size.
//   Numerics: logit - maximum - ln(sum of weights at factor 1 / 2^30), in f64, rounded once. False where a
//   logit is a
//             NaN or an infinity; then nothing is written.
bool score(const float* logits, std::size_t vocab_size, std::int32_t token, std::size_t top,
           const KernelTable& kernels, SamplingScratch& scratch, TokenScore& out, std::int32_t* top_tokens,
           float* top_logprobs);

}  // namespace tsqp
