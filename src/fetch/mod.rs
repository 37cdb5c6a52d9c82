//! Fetches an image and streams it into a slot.
