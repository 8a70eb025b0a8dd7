package capture

import (
	"fmt"

	"github.com/google/nftables"

	"github.com/signet-mesh/signet/agent/capture/nft"
)

// Verify reads rules, settings and guard back from the kernel and compares them with
// what Apply writes. It returns nil only when they are exactly that, an error
// that wraps ErrNotCaptured and names the first difference when they are not,
// and another error when they could not be read. It does not look at tables
// of others.
func (n *NS) Verify(o Options) error {
	n.apply.Lock()
	defer n.apply.Unlock()
	return n.verify(o)
}

func (n *NS) verify(o Options) error {
	if err := o.check(); err != nil {
		return err
	}
	c, err := n.nft()
	if err != nil {
		return err
	}
	diff, err := nft.Differs(c, n.fd(), table, append(ruleset(o), chain{Name: savedChain}), savedChain)
	if err != nil {
		return fmt.Errorf("capture: %s: %w", n.path, err)
	}
	if diff != "" {
		return n.differs("%s", diff)
	}
	saved, err := n.saved()
	if err != nil {
		return err
	}
	if saved == nil {
		return n.differs("chain %s does not hold the settings from before", savedChain)
	}
	now, err := n.readSettings()
	if err != nil {
		return err
	}
	want := wanted(saved)
	for _, name := range settingNames {
		if _, has := now[name]; has && now[name] != want[name] {
			return n.differs("net.ipv4.%s is %q, want %q", name, now[name], want[name])
		}
	}
	if diff, err = n.guardDiffers(); err != nil {
		return err
	}
	if diff != "" {
		return n.differs("%s", diff)
	}
	return nil
}

func (n *NS) differs(format string, args ...any) error {
	return fmt.Errorf("capture: %s: %w: %s", n.path, ErrNotCaptured, fmt.Sprintf(format, args...))
}

func (n *NS) findTable() (*nftables.Table, error) {
	c, err := n.nft()
	if err != nil {
		return nil, err
	}
	found, err := nft.Find(c, table)
	if err != nil {
		return nil, fmt.Errorf("capture: %s: %w", n.path, err)
	}
	return found, nil
}

// readRules returns the table's rules in order; none if there is no table.
func (n *NS) readRules() ([]nft.RawRule, error) {
	rules, err := nft.Read(n.fd(), table)
	if err != nil {
		return nil, fmt.Errorf("capture: %s: %w", n.path, err)
	}
	return rules, nil
}
