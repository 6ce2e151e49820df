//! One expert from a group, and the router afterwards. One method a file.
