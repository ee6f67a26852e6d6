//! Sets, maps and sorted lists of what an iterator yields. `collect` into the former, and `sort`, take some four KiB of
//! machine code of their own for each type.

use std::collections::BinaryHeap;

/// Puts all items into a new collection, one by one.
pub fn gather<T, C: Default + Extend<T>>(items: impl IntoIterator<Item = T>) -> C {
    let mut all = C::default();
    items.into_iter().for_each(|item| all.extend([item]));
    all
}

/// The items, the least first; those that are equal in any order.
pub fn sorted<T: Ord>(items: impl IntoIterator<Item = T>) -> Vec<T> {
    BinaryHeap::from_iter(items).into_sorted_vec()
}
