//! Routing statistics: import and export of the interchange format.
