package relay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/xds"
)

// saveCopy writes a set to a file, whole or not at all.
func saveCopy(path string, set xds.Set) error {
	if path == "" {
		return nil
	}
	var doc discoveryv3.DeltaDiscoveryResponse
	for _, byName := range set {
		for _, r := range byName {
			doc.Resources = append(doc.Resources, &discoveryv3.Resource{Name: r.Name, Version: r.Version, Resource: r.Body})
		}
	}
	b, err := proto.Marshal(&doc)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".xds-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// loadCopy reads what saveCopy wrote; nil without error when there is nothing.
func loadCopy(path string) (xds.Set, error) {
	if path == "" {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var doc discoveryv3.DeltaDiscoveryResponse
	if err := proto.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	set := xds.Set{}
	for _, t := range types {
		set[t] = map[string]xds.Resource{} // a type may have nothing in it
	}
	for _, r := range doc.GetResources() {
		if r.GetResource() == nil || r.GetName() == "" {
			return nil, fmt.Errorf("%s: an entry without a name or body", path)
		}
		set.Put(xds.Resource{Name: r.GetName(), Version: r.GetVersion(), Body: r.GetResource()})
	}
	return set, nil
}
