// Package chart installs the Helm chart and the images of this tree into a real
// cluster as a user would, and removes them again. It takes minutes, so it is
// not part of the ordinary tests: see `make chart-test`.
package chart
