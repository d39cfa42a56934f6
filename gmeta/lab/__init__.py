"""A laboratory for stragglers and faults: real training on emulated devices, with scripted troubles."""
