//! The roof: recipe, checked plan, streamed run, report; the only place that knows the order of the
//! stages.
