// What makes rW of pads r: a plug-in of the stock. The one here multiplies (direct_maker.h); another may make
// many rows of a Linear at once in some other way, as the rows that it is asked for are neighbours.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace tsqp {

// Has makers rest while others want the cores that they work on. A thread that yields its core would give it to
// a maker of its own process for a whole slice of time, however low the maker's priority is.
class Rest {
  public:
    // What a maker calls now and then: it returns when there is no reason to rest any more.
    void look() const {
        while (is_asked_.load(std::memory_order_relaxed)) is_asked_.wait(true, std::memory_order_relaxed);
    }
    // Returns whether it was so before.
    bool ask(bool is_asked) {
        // SYNC POINT: in one order with the end of a stock, which is said before makers are called from their rest:
        // who asks for rest after that sees it.
        const bool was = is_asked_.exchange(is_asked, std::memory_order_seq_cst);
        if (was && !is_asked) is_asked_.notify_all();
        return was;
    }

  private:
    std::atomic<bool> is_asked_{false};
};

class PadMaker {
  public:
    virtual ~PadMaker() = default;
    // How many rows of a Linear it likes to make at once, 1 at least. It is never asked for more.
    virtual std::size_t batch_rows() const = 0;
    // products [rows, outputs] = r W mod p, in [0, p), of the rows [first_row, first_row + rows) of a Linear's
    // pads. Called by several threads at once, each with a Linear of its own. Looks at `rest` some times in a
    // millisecond. What it throws ends the stock.
    virtual void make(std::size_t linear, std::uint64_t first_row, std::size_t rows, std::uint32_t* products,
                      const Rest& rest) = 0;
};

}  // namespace tsqp
