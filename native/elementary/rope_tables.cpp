#include "elementary/rope_tables.h"

#include "elementary/trigonometry.h"

namespace tsqp {

void rope_tables(const RopeTablesArgs& args, std::size_t begin, std::size_t end) noexcept {
    for (std::size_t position = begin; position < end; ++position) {
        for (std::size_t pair = 0; pair < args.half_dim; ++pair) {
            const float angle = static_cast<float>(position) * args.inverse_frequencies[pair];
            const SineCosine exact = sine_and_cosine(static_cast<double>(angle));
            const std::size_t at = position * args.half_dim + pair;
            args.cosines[at] = static_cast<float>(exact.cosine) * args.scale;
            args.sines[at] = static_cast<float>(exact.sine) * args.scale;
        }
    }
}

}  // namespace tsqp
