// Zeroed private memory for many matrices that are read from end to end, over and over: one behind another on
// whole large pages.
//
// The kernel takes a large page only for an aligned stretch that lies whole within a mapping when it is first
// touched. Of matrices of a megabyte with a mapping each a quarter got one, and at each of the others' small
// pages a processor's look-ahead ends and an address is looked up anew.
#pragma once

#include <cstddef>
#include <memory>

namespace tsqp {

// A piece of a run to which the thread's next pieces belong too; memory goes back to the kernel with the last
// piece of its run. Begins with a page. Raises bad_alloc.
std::shared_ptr<std::byte> stacked_pages(std::size_t size_bytes);

}  // namespace tsqp
