#include "sampler/sampler.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "sampler/logarithm.h"
#include "sampler/philox.h"

namespace tsqp {
namespace {

using Candidate = SamplingScratch::Candidate;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The last token that a filter keeps: likelier ones come before it, and of equal ones the smaller.
struct Boundary {
    float logit;
    std::uint32_t token;

    bool keeps(float other, std::uint32_t other_token) const {
        return other > logit || (other == logit && other_token <= token);
    }
};

bool comes_before(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// How much of a measure lies how far below the largest logit. A bucket holds what lies between its
// neighbours.
class Histogram {
  public:
    Histogram(float highest, float lowest) : highest_(highest) {
        if (highest > lowest)
            scale_ = static_cast<float>(kLast / (static_cast<double>(highest) - static_cast<double>(lowest)));
    }

    // The order of min's operands makes the last bucket of -inf, and of an infinity times nothing.
    std::int32_t bucket_of(float logit) const {
        return static_cast<std::int32_t>(std::min(static_cast<float>(kLast), (highest_ - logit) * scale_));
    }
    void add(std::int32_t bucket, std::uint64_t measure) { measures_[bucket] += measure; }

    // The bucket in which a sum from the largest logit on reaches `needed`, or the last; adds what lies
    // before it.
    std::int32_t reach(std::uint64_t needed, std::uint64_t& reached) const {
        std::int32_t bucket = 0;
        while (bucket < kLast && reached + measures_[bucket] < needed) reached += measures_[bucket++];
        return bucket;
    }

  private:
    static constexpr std::int32_t kLast = 2047;
    float highest_, scale_ = 1.0f;
    std::uint64_t measures_[kLast + 1] = {};
};

// Of candidates in ascending order of tokens, the one at which a sum of measures, likeliest first, reaches
// `needed`; the last where it does not. They are used up.
template <class Measure>
Boundary boundary_of(std::vector<Candidate>& undecided, std::uint64_t reached, std::uint64_t needed,
                     const Measure& measure) {
    constexpr std::size_t kSorted = 128;
    while (undecided.size() > kSorted) {
        float highest = -kInfinity, lowest = kInfinity;
        for (const Candidate& candidate : undecided) {
            highest = std::max(highest, candidate.logit);
            if (candidate.logit != -kInfinity) lowest = std::min(lowest, candidate.logit);
        }
        const bool some_are_out = undecided.end() != std::find_if(undecided.begin(), undecided.end(),
                                                                  [](const Candidate& candidate) {
                                                                      return candidate.logit == -kInfinity;
                                                                  });
        // Equal ones are in order already.
        if (highest == -kInfinity || (highest == lowest && !some_are_out)) break;
        Histogram histogram(highest, lowest);
        for (const Candidate& candidate : undecided)
            histogram.add(histogram.bucket_of(candidate.logit), measure(candidate.weight));
        const std::int32_t bucket = histogram.reach(needed, reached);
        std::erase_if(undecided, [&](const Candidate& candidate) {
            return histogram.bucket_of(candidate.logit) != bucket;
        });
    }
    if (undecided.empty()) return {-kInfinity, 0};
    if (undecided.size() <= kSorted) std::sort(undecided.begin(), undecided.end(), comes_before);
    std::size_t last = 0;
    while (last + 1 < undecided.size() && (reached += measure(undecided[last].weight)) < needed) ++last;
    return {undecided[last].logit, undecided[last].token};
}

std::uint64_t weight_of(std::uint32_t weight) { return weight; }
std::uint64_t one_each(std::uint32_t weight) { return weight != 0; }

// All bits, or none.
std::uint32_t mask(bool holds) { return -std::uint32_t{holds}; }

// A row of logits, looked at by blocks.
class Row {
  public:
    Row(const float* logits, std::size_t size, const KernelTable& kernels, SamplingScratch& scratch)
        : logits_(logits), size_(size), kernels_(&kernels), scratch_(&scratch) {
        scratch.maxima.resize((size + kLogitBlock - 1) / kLogitBlock);
        is_finite_ = kernels.logit_maxima({logits, size, scratch.maxima.data()});
        maximum_ = *std::max_element(scratch.maxima.begin(), scratch.maxima.end());
    }

    bool is_finite() const { return is_finite_; }
    float maximum() const { return maximum_; }

    // The first of the largest.
    std::int32_t likeliest() const {
        const std::vector<float>& maxima = scratch_->maxima;
        const auto block = std::find(maxima.begin(), maxima.end(), maximum_) - maxima.begin();
        const float* first = logits_ + static_cast<std::size_t>(block) * kLogitBlock;
        return static_cast<std::int32_t>(std::find(first, logits_ + size_, maximum_) - logits_);
    }

    // At least `count` logits are not below it: each block's largest is one.
    float floor_of_count(std::size_t count) const {
        const std::vector<float>& maxima = scratch_->maxima;
        if (count > maxima.size()) return -kInfinity;
        std::vector<float>& largest = scratch_->largest;
        largest.assign(maxima.begin(), maxima.end());
        const auto nth = largest.begin() + static_cast<std::ptrdiff_t>(count - 1);
        std::nth_element(largest.begin(), nth, largest.end(), std::greater<>());
        return *nth;
    }

    // Whatever weighs `weight` times the likeliest, or more, is not below it. It only bounds what is looked
    // at, so that a logarithm that differs between machines changes no token.
    float floor_of_weight(double weight, float factor) const {
        const double slack = 0.01;
        const double floor = maximum_ + (std::log(weight) - slack) / static_cast<double>(factor);
        return std::nextafter(static_cast<float>(std::max(floor, -double{FLT_MAX})), -kInfinity);
    }

    // The tokens whose logits are not below `floor`, in scratch.candidates, ascending; their weights are not
    // set.
    void collect(float floor) {
        std::vector<Candidate>& found = scratch_->candidates;
        found.clear();
        for_each_from(floor, [&](std::size_t first, std::size_t end) {
            for (std::size_t i = first; i < end; ++i)
                if (logits_[i] >= floor) found.push_back({logits_[i], static_cast<std::uint32_t>(i), 0});
        });
    }

    // Weighs all tokens; returns the sum.
    std::uint64_t weigh_all(float factor) {
        scratch_->weights.resize(size_);
        kernels_->logit_weights({logits_, maximum_, factor, scratch_->weights.data()}, 0, size_);
        scratch_->sums.resize(scratch_->maxima.size());
        const auto unchanged = [](std::size_t, std::uint32_t weight) { return weight; };
        return sum(0, scratch_->maxima.size(), -kInfinity, unchanged);
    }

    // Of weighed tokens: where a sum of measures, likeliest first, reaches `needed`, looked for among those
    // whose logits are not below `floor`; the last of them where it does not.
    template <class Measure>
    Boundary boundary(float floor, std::uint64_t needed, const Measure& measure) {
        const std::uint32_t* weights = scratch_->weights.data();
        Histogram histogram(maximum_, floor);
        std::int32_t buckets[kLogitBlock];
        // Several buckets at once; their sums are one after another.
        const auto find_buckets = [&](std::size_t first, std::size_t end) {
            for (std::size_t i = first; i < end; ++i) buckets[i - first] = histogram.bucket_of(logits_[i]);
        };
        for_each_from(floor, [&](std::size_t first, std::size_t end) {
            find_buckets(first, end);
            for (std::size_t i = first; i < end; ++i) histogram.add(buckets[i - first], measure(weights[i]));
        });
        std::uint64_t reached = 0;
        const std::int32_t bucket = histogram.reach(needed, reached);
        std::vector<Candidate>& undecided = scratch_->candidates;
        undecided.clear();
        for_each_from(floor, [&](std::size_t first, std::size_t end) {
            find_buckets(first, end);
            if (std::count(buckets, buckets + (end - first), bucket) == 0) return;
            for (std::size_t i = first; i < end; ++i)
                if (buckets[i - first] == bucket)
                    undecided.push_back({logits_[i], static_cast<std::uint32_t>(i), weights[i]});
        });
        return boundary_of(undecided, reached, needed, measure);
    }

    // Weighs as nothing whatever weighs less than `least`; returns the sum of the others.
    std::uint64_t keep_from(std::uint32_t least) {
        const auto change = [least](std::size_t, std::uint32_t weight) {
            return weight & mask(weight >= least);
        };
        return sum(0, scratch_->maxima.size(), -kInfinity, change);
    }

    // Weighs what is behind the boundary as nothing; returns the sum of the others.
    std::uint64_t keep_to(const Boundary& boundary) {
        // By value, and without a branch that nobody could foretell: several at once.
        const auto all_of_equal = [logits = logits_, edge = boundary.logit](std::size_t i,
                                                                            std::uint32_t weight) {
            return weight & mask(logits[i] >= edge);
        };
        const auto none_of_equal = [logits = logits_, edge = boundary.logit](std::size_t i,
                                                                             std::uint32_t weight) {
            return weight & mask(logits[i] > edge);
        };
        const auto some_of_equal = [logits = logits_, boundary](std::size_t i, std::uint32_t weight) {
            return boundary.keeps(logits[i], static_cast<std::uint32_t>(i)) ? weight : 0;
        };
        const std::size_t last = boundary.token / kLogitBlock;
        return sum(0, last, boundary.logit, all_of_equal) +
               sum(last, last + 1, boundary.logit, some_of_equal) +
               sum(last + 1, scratch_->maxima.size(), boundary.logit, none_of_equal);
    }

    // The token in whose share of all weights, in ascending order of tokens, `target` lies.
    std::int32_t walk(std::uint64_t target) const {
        std::size_t block = 0;
        while (target >= scratch_->sums[block]) target -= scratch_->sums[block++];
        std::size_t i = block * kLogitBlock;
        while (target >= scratch_->weights[i]) target -= scratch_->weights[i++];
        return static_cast<std::int32_t>(i);
    }

  private:
    // The blocks that hold a logit that is not below `floor`.
    template <class Body>
    void for_each_from(float floor, const Body& body) const {
        for (std::size_t block = 0, first = 0; first < size_; ++block, first += kLogitBlock)
            if (scratch_->maxima[block] >= floor) body(first, std::min(first + kLogitBlock, size_));
    }

    // Changes the weights of blocks [begin, end) and sums them up, by block and in all. A block whose logits
    // are all below `floor` is left out.
    template <class Change>
    std::uint64_t sum(std::size_t begin, std::size_t end, float floor, const Change& change) {
        std::uint32_t* weights = scratch_->weights.data();
        std::uint64_t total = 0;
        for (std::size_t block = begin; block < end; ++block) {
            scratch_->sums[block] = 0;
            if (scratch_->maxima[block] < floor) continue;
            const std::size_t first = block * kLogitBlock, last = std::min(first + kLogitBlock, size_);
            std::uint64_t of_block = 0;
            for (std::size_t i = first; i < last; ++i) weights[i] = change(i, weights[i]);
            for (std::size_t i = first; i < last; ++i) of_block += weights[i];
            scratch_->sums[block] = of_block;
            total += of_block;
        }
        return total;
    }

    const float* logits_;
    std::size_t size_;
    const KernelTable* kernels_;
    SamplingScratch* scratch_;
    bool is_finite_;
    float maximum_;
};

// A fraction of a sum of weights, rounded up: at least 1, at most all.
std::uint64_t share_of(double fraction, std::uint64_t total) {
    const double share = std::ceil(fraction * static_cast<double>(total));
    if (share >= static_cast<double>(total)) return total;
    return std::max<std::uint64_t>(1, static_cast<std::uint64_t>(share));
}

// A number of [0, total) from one of [0, 2^64).
std::uint64_t scaled(std::uint64_t random, std::uint64_t total) {
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(random) * total) >> 64);
}

float held(float x) { return std::clamp(x, -FLT_MAX, FLT_MAX); }

// A rule's number in f32: no infinity, which times a logit of zero is none.
float held(double x) { return static_cast<float>(std::clamp(x, -double{FLT_MAX}, double{FLT_MAX})); }

}  // namespace

TokenSampler::TokenSampler(SamplingRules rules, std::size_t vocab_size, std::span<const std::int32_t> prompt)
    : rules_(std::move(rules)), vocab_size_(vocab_size) {
    if (rules_.repetition_penalty == 1.0) return;
    for (const std::int32_t token : prompt)
        if (place_.emplace(token, seen_.size()).second) seen_.push_back({token, 0});
}

void TokenSampler::grow(std::int32_t token) {
    output_.push_back(token);
    if (rules_.repetition_penalty == 1.0 && rules_.presence_penalty == 0.0 && rules_.frequency_penalty == 0.0)
        return;
    const auto [at, is_new] = place_.emplace(token, seen_.size());
    if (is_new) seen_.push_back({token, 0});
    ++seen_[at->second].count;
}

bool TokenSampler::edits() const {
    return !rules_.allowed.empty() || !rules_.bad_words.empty() || !rules_.bias.empty() || !seen_.empty() ||
           position() < rules_.min_tokens;
}

bool TokenSampler::ends_with(std::span<const std::int32_t> tokens) const {
    return tokens.size() <= output_.size() && std::equal(tokens.rbegin(), tokens.rend(), output_.rbegin());
}

void TokenSampler::edit(float* logits) const {
    if (!rules_.allowed.empty()) {
        // Between two that are allowed, none is.
        std::size_t next = 0;
        for (const std::int32_t token : rules_.allowed) {
            std::fill(logits + next, logits + token, -kInfinity);
            next = static_cast<std::size_t>(token) + 1;
        }
        std::fill(logits + next, logits + vocab_size_, -kInfinity);
    }
    for (const std::vector<std::int32_t>& words : rules_.bad_words)
        if (ends_with(std::span(words).first(words.size() - 1))) logits[words.back()] = -kInfinity;
    if (position() < rules_.min_tokens)
        for (const std::int32_t token : rules_.ending) logits[token] = -kInfinity;
    // What is not allowed stays so: an infinity less any number is one.
    const auto change = [&](std::int32_t token, const auto& by) {
        if (logits[token] != -kInfinity) logits[token] = held(by(logits[token]));
    };
    for (const auto& [token, bias] : rules_.bias) change(token, [&](float x) { return x + held(bias); });
    const auto repetition = held(rules_.repetition_penalty);
    const auto frequency = held(rules_.frequency_penalty);
    const auto presence = held(rules_.presence_penalty);
    for (const Seen& seen : seen_)
        change(seen.token, [&](float x) {
            if (repetition != 1.0f) x = held(x > 0.0f ? x / repetition : x * repetition);
            if (seen.count == 0) return x;
            x = held(x - frequency * static_cast<float>(seen.count));
            return x - presence;
        });
}

std::int32_t TokenSampler::draw(const float* logits, const KernelTable& kernels,
                                SamplingScratch& scratch) const {
    Row row(logits, vocab_size_, kernels, scratch);
    if (!row.is_finite()) return kNotFinite;
    if (edits()) {
        scratch.edited.assign(logits, logits + vocab_size_);
        edit(scratch.edited.data());
        row = Row(scratch.edited.data(), vocab_size_, kernels, scratch);
        if (row.maximum() == -kInfinity) return kNothingLeft;
    }
    if (rules_.temperature == 0.0) return row.likeliest();
    // Held, so that zero, the likeliest one's distance, times it stays zero.
    const float factor = static_cast<float>(std::min(1.0 / rules_.temperature, double{FLT_MAX}));
    const std::uint64_t random = philox({rules_.seed, rules_.stream}, {position(), 0, 0, 0})[0];
    std::uint64_t total = row.weigh_all(factor);
    // What is below weighs nothing.
    float floor = row.floor_of_weight(0.25 / kLargestWeight, factor);
    if (rules_.min_p > 0.0) {
        floor = std::max(floor, row.floor_of_weight(rules_.min_p, factor));
        total = row.keep_from(static_cast<std::uint32_t>(share_of(rules_.min_p, kLargestWeight)));
    }
    if (rules_.top_k != 0 && rules_.top_k < vocab_size_) {
        floor = std::max(floor, row.floor_of_count(rules_.top_k));
        total = row.keep_to(row.boundary(floor, rules_.top_k, one_each));
    }
    if (rules_.top_p < 1.0) {
        // What weighs less than an equal share of what is left out, is left out.
        const double left_out =
            (1.0 - rules_.top_p) * static_cast<double>(total) / static_cast<double>(vocab_size_);
        if (left_out > 2.0)
            floor = std::max(floor, row.floor_of_weight((left_out - 1.0) / kLargestWeight, factor));
        total = row.keep_to(row.boundary(floor, share_of(rules_.top_p, total), weight_of));
    }
    return row.walk(scaled(random, total));
}

bool score(const float* logits, std::size_t vocab_size, std::int32_t token, std::size_t top,
           const KernelTable& kernels, SamplingScratch& scratch, TokenScore& out, std::int32_t* top_tokens,
           float* top_logprobs) {
    Row row(logits, vocab_size, kernels, scratch);
    if (!row.is_finite()) return false;
    const double maximum = row.maximum();
    const double sum = static_cast<double>(row.weigh_all(1.0f)) / kLargestWeight;
    const double normaliser = natural_logarithm(sum);
    const auto logprob = [&](float logit) {
        return static_cast<float>((static_cast<double>(logit) - maximum) - normaliser);
    };
    const float chosen = logits[token];
    const auto rank =
        std::count_if(logits, logits + vocab_size, [&](float logit) { return logit >= chosen; });
    out = {logprob(chosen), static_cast<std::int32_t>(rank)};
    if (top == 0) return true;
    row.collect(row.floor_of_count(top));
    std::vector<Candidate>& candidates = scratch.candidates;
    scratch.undecided = candidates;
    // All count, also what weighs nothing.
    const Boundary last =
        boundary_of(scratch.undecided, 0, top, [](std::uint32_t) { return std::uint64_t{1}; });
    std::erase_if(candidates,
                  [&](const Candidate& candidate) { return !last.keeps(candidate.logit, candidate.token); });
    std::sort(candidates.begin(), candidates.end(), comes_before);
    for (std::size_t i = 0; i < top; ++i) {
        top_tokens[i] = static_cast<std::int32_t>(candidates[i].token);
        top_logprobs[i] = logprob(logits[top_tokens[i]]);
    }
    return true;
}

}  // namespace tsqp
