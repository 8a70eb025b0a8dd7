package shop

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/examples/shop/tour"
)

// Defends the tour from losing a part, and from naming files that are not there.
// The commands themselves run on a real cluster, in the end-to-end suite.
func TestTour(t *testing.T) {
	content, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	steps, err := tour.Extract(string(content))
	if err != nil {
		t.Fatal(err)
	}
	var commands strings.Builder
	for _, s := range steps {
		commands.WriteString(s.Command + "\n")
	}
	for _, want := range []string{
		"apply -f examples/shop/manifests\n", "signet status", "exec deploy/web", "exec deploy/reports", "signet audit", "policy explain",
		"patch allowpolicy", "signet.dev/mesh=observe", "policy generate", "quarantine.yaml", "delete namespace shop data",
	} {
		if !strings.Contains(commands.String(), want) {
			t.Errorf("the tour has no %q", want)
		}
	}
	for _, name := range regexp.MustCompile(`examples/shop/\S+`).FindAllString(commands.String(), -1) {
		if _, err := os.Stat(filepath.Join("../..", name)); err != nil {
			t.Error(err)
		}
	}
}
