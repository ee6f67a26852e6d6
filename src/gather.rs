//! Sets and maps of what an iterator yields, one by one. `collect` sorts it first, by some four KiB of machine code
//! of its own for each type.

/// Puts all items into a new collection.
pub fn gather<T, C: Default + Extend<T>>(items: impl IntoIterator<Item = T>) -> C {
    let mut all = C::default();
    items.into_iter().for_each(|item| all.extend([item]));
    all
}
