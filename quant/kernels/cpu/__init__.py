"""The ops on a processor, in C++: src/ is compiled by `build`, called by `backend`."""
