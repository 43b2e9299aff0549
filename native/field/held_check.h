// `_native.FieldCheck`: checks its arguments while Python's lock is held, then works without it.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "border/held_slots.h"
#include "field/begun_rows.h"
#include "field/check.h"
#include "kernels/array_arguments.h"
#include "kernels/dispatch.h"

namespace tsqp {

class HeldCheck {
  public:
    // `is_blinded`: no row crosses that no pad was taken from.
    HeldCheck(const FieldWeights& weights, const py::array& vectors, bool is_blinded)
        : check_(make(weights, vectors)), begun_(check_.num_vectors()), is_blinded_(is_blinded) {}

    std::size_t num_bytes() const { return check_.num_bytes() + begun_.num_bytes(); }

    void fetch() const { check_.fetch(); }

    void begin(HeldSlots& slots, Index x_slot, Index m_slot, Index first_row, Index rows,
               const std::optional<py::array>& copy, const std::shared_ptr<PadRows>& pads) {
        const std::size_t first = not_negative("first_row", first_row), count = not_negative("rows", rows);
        const Rows x = own_rows(slots, "x_slot", x_slot, first, count, check_.inputs());
        const Rows m = field_rows(slots, "m_slot", m_slot, first, count, check_.inputs());
        if (!is_whole_words(m.row_bytes()))
            throw py::value_error("m_slot: a row takes " + std::to_string(m.row_bytes()) +
                                  " bytes, expected whole words of 8");
        std::uint32_t* const to = copy_of(copy, rows, check_.inputs());
        if (is_blinded_ && pads == nullptr)
            throw py::value_error("pads: got none, and nothing crosses here without");
        const std::string_view name = active_kernels().name;
        const FieldKernels& field = field_kernels_of(name);
        const CheckKernels& kernels = check_kernels_of(name);
        if (pads) require_fit(*pads, count);
        BegunRows::Beginning claim(begun_, first, count);
        std::optional<PadsOfRows> of_rows;
        if (pads) {
            pads->spend();
            of_rows.emplace(pads->stock().keys(), pads->linear(), pads->first_row());
        }
        {
            const HeldSlots::Running running(slots);
            const py::gil_scoped_release unlocked;
            // SAFETY: slots begin at a page, and rows of f32 and u32 keep to their alignment.
            check_.begin(field, kernels, reinterpret_cast<const float*>(x.data), count,
                         reinterpret_cast<std::uint32_t*>(m.data), claim.scales.data(), claim.sums.data(), to,
                         of_rows ? &*of_rows : nullptr);
        }
        // UNTRUSTED: what was written to an arena that is gone is nowhere.
        slots.require_intact();
        claim.done(pads);
    }

    bool finish(HeldSlots& slots, Index y_slot, Index out_slot, Index first_row, Index rows,
                const std::optional<py::array>& copy) {
        const std::size_t first = not_negative("first_row", first_row), count = not_negative("rows", rows);
        const Rows y = field_rows(slots, "y_slot", y_slot, first, count, check_.outputs());
        const Rows out = own_rows(slots, "out_slot", out_slot, first, count, check_.outputs());
        std::uint32_t* const to = copy_of(copy, rows, check_.outputs());
        const CheckKernels& kernels = check_kernels_of(active_kernels().name);
        BegunRows::Finishing claim(begun_, first, count);
        bool holds = false;
        {
            const HeldSlots::Running running(slots);
            const py::gil_scoped_release unlocked;
            // SAFETY: as above.
            holds = check_.finish(kernels, reinterpret_cast<const std::uint32_t*>(y.data), count,
                                  claim.scales.data(), claim.sums.data(), reinterpret_cast<float*>(out.data),
                                  to, claim.products());
        }
        claim.done();
        // UNTRUSTED: what was read of an arena that is gone is nobody's result.
        slots.require_intact();
        return holds;
    }

  private:
    void require_fit(const PadRows& pads, std::size_t count) const {
        if (pads.rows() != count)
            throw py::value_error("pads: got those of " + std::to_string(pads.rows()) + " rows, expected " +
                                  std::to_string(count));
        if (pads.stock().fingerprint(pads.linear()) != check_.fingerprint())
            throw py::value_error("pads: of Linear " + std::to_string(pads.linear()) +
                                  " of their stock, whose weights are not this check's");
    }

    static FieldCheck make(const FieldWeights& weights, const py::array& vectors) {
        const auto* words =
            data_of<const std::uint32_t>(vectors, "vectors", {-1, static_cast<Index>(weights.outputs())});
        const auto count = static_cast<std::size_t>(vectors.shape(0));
        const CheckKernels& kernels = check_kernels_of(active_kernels().name);
        const py::gil_scoped_release unlocked;
        return FieldCheck(kernels, weights, words, count);
    }

    // Rows of floats, which are nobody else's.
    static Rows own_rows(const HeldSlots& slots, const char* name, Index slot, std::size_t first,
                         std::size_t count, std::size_t width) {
        const std::size_t index = not_negative(name, slot);
        const Rows rows = slots.rows(index, first, count, width);
        if (rows.dtype != Dtype::f32) throw py::type_error(std::string(name) + ": expected a slot of f32");
        if (!slots.is_own(index))
            throw py::value_error(std::string(name) + ": expected a slot of private memory");
        return rows;
    }

    // Rows of field elements, which the other side may have.
    static Rows field_rows(const HeldSlots& slots, const char* name, Index slot, std::size_t first,
                           std::size_t count, std::size_t width) {
        const Rows rows = slots.rows(not_negative(name, slot), first, count, width);
        if (rows.dtype != Dtype::u32) throw py::type_error(std::string(name) + ": expected a slot of u32");
        return rows;
    }

    static std::uint32_t* copy_of(const std::optional<py::array>& copy, Index rows, std::size_t width) {
        if (!copy) return nullptr;
        return data_of<std::uint32_t>(*copy, "copy", {rows, static_cast<Index>(width)}, true);
    }

    const FieldCheck check_;
    BegunRows begun_;
    const bool is_blinded_;
};

}  // namespace tsqp
