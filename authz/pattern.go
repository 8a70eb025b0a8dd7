package authz

// Pattern matches SPIFFE IDs segment by segment.
type Pattern struct{}
