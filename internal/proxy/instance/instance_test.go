package instance

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func ids(t *testing.T, dir string) []Instance {
	t.Helper()
	all, err := List(dir)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// die is what is left of an instance whose process was killed.
func (o *Own) die() { o.lock.Close() }

// TestInstances: a proxy lives as long as its process, whatever is left of it;
// if a dead one counted, its connections would stay open in the audit and a
// proxy that ends would wait for it to take over.
func TestInstances(t *testing.T) {
	dir := t.TempDir()
	if n := len(ids(t, dir)); n != 0 {
		t.Fatalf("%d instances before the first", n)
	}
	first, err := Create(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	second, err := Create(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if got := ids(t, dir); len(got) != 2 || got[0].ID != first.ID || got[1].ID != second.ID || first.ID >= second.ID {
		t.Fatalf("%+v, want %s and %s", got, first.ID, second.ID)
	}
	began := time.Now()
	if err := first.Renew(); err != nil {
		t.Fatal(err)
	}
	if err := second.Drain(); err != nil {
		t.Fatal(err)
	}
	got := ids(t, dir)
	if got[0].Epoch.Before(began.Add(-time.Second)) || got[0].Draining || !got[1].Epoch.IsZero() || !got[1].Draining {
		t.Errorf("%+v, want the first with an epoch of %s, the second draining", got, began)
	}
	if Draining(dir, first.ID) || !Draining(dir, second.ID) || Draining(dir, "") || Draining(dir, "../proxies/"+second.ID) {
		t.Error("Draining says something else")
	}
	first.die()
	if got := ids(t, dir); len(got) != 1 || got[0].ID != second.ID {
		t.Errorf("%+v, want %s alone", got, second.ID)
	}
	third, err := Create(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(first.Dir); !os.IsNotExist(err) {
		t.Errorf("what the dead one left is still there: %v", err)
	}
	if _, err := os.Stat(second.Dir); err != nil {
		t.Errorf("a living one was cleared away: %v", err)
	}
	for _, o := range []*Own{second, third} {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	}
	left, err := os.ReadDir(Root(dir))
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if n := len(ids(t, dir)); n != 0 {
		t.Errorf("%d instances after the last", n)
	}
	if want := filepath.Join(third.Dir, "admin.sock"); third.Admin() != want {
		t.Errorf("admin socket %s, want %s", third.Admin(), want)
	}
}
