package authz

// Model is a compiled set of policies. It is immutable.
type Model struct{}
