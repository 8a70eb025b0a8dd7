package cniconf

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/version"
)

// Entry is the plugin's own part of a configuration.
type Entry struct {
	// Socket is the agent's; absolute.
	Socket string `json:"socket"`
	// OwnNamespace is the namespace of the release, whose pods never wait.
	OwnNamespace string `json:"ownNamespace,omitempty"`
	// Timeout is how long one call may take, such as "25s"; empty is the
	// plugin's default.
	Timeout string `json:"timeout,omitempty"`
}

const (
	oldest = "0.3.0" // the first version in which plugins follow each other
	newest = "1.1.0" // what signet-cni speaks
)

// chain returns a configuration list like raw, a list or a single plugin,
// with the entry at its end. Other fields are kept as they are.
func chain(raw []byte, isList bool, entry Entry) ([]byte, error) {
	list := map[string]json.RawMessage{}
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("is no JSON object: %w", err)
	}
	if !isList {
		if _, err := libcni.NetworkPluginConfFromBytes(raw); err != nil {
			return nil, err
		}
		single := list
		list = map[string]json.RawMessage{}
		for _, key := range []string{"cniVersion", "name"} {
			if v, ok := single[key]; ok {
				list[key] = v
			}
		}
		plugins, err := json.Marshal([]json.RawMessage{raw})
		if err != nil {
			return nil, err
		}
		list["plugins"] = plugins
	}
	var plugins []json.RawMessage
	if err := json.Unmarshal(list["plugins"], &plugins); err != nil {
		return nil, fmt.Errorf("plugins is no list: %w", err)
	}
	kept := []json.RawMessage{}
	for n, p := range plugins {
		var has struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(p, &has); err != nil || has.Type == "" {
			return nil, fmt.Errorf("plugins[%d] has no type", n)
		}
		if has.Type != Plugin {
			kept = append(kept, p)
		}
	}
	if len(kept) == 0 {
		return nil, errors.New("plugins is empty")
	}
	own, err := json.Marshal(struct {
		Type string `json:"type"`
		Entry
	}{Plugin, entry})
	if err != nil {
		return nil, err
	}
	if list["plugins"], err = json.Marshal(append(kept, own)); err != nil {
		return nil, err
	}
	out, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return nil, err
	}
	out = append(out, '\n')
	return out, usable(out)
}

// usable says whether runtimes and signet-cni both understand the list.
func usable(list []byte) error {
	l, err := libcni.NetworkConfFromBytes(list)
	if err != nil {
		return err
	}
	if l.Name == "" {
		return errors.New("name is empty")
	}
	low, err := version.GreaterThanOrEqualTo(l.CNIVersion, oldest)
	if l.CNIVersion == "" || err != nil || !low {
		return fmt.Errorf("cniVersion %q: plugins can follow each other from %s on; set it in the configuration of the node's CNI", l.CNIVersion, oldest)
	}
	if high, err := version.GreaterThan(l.CNIVersion, newest); err != nil || high {
		return fmt.Errorf("cniVersion %q: this release of signet-cni knows versions up to %s", l.CNIVersion, newest)
	}
	return nil
}
