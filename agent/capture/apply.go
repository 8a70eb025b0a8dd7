package capture

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/nftables"

	"github.com/signet-mesh/signet/agent/capture/nft"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Apply puts capture in place: the rules, in one transaction that replaces
// whatever is in the table, then the settings, and then the guard. Where everything is in
// place already it changes nothing. When it repairs, or when the options have
// changed, connections through the proxy survive, and at no moment are there
// fewer rules than the old or the new ones.
//
// Connections from before that pass the proxy by break at their next packet;
// ResetEstablished ends them, idle ones too, at once.
func (n *NS) Apply(o Options) error {
	n.apply.Lock()
	defer n.apply.Unlock()
	err := n.verify(o)
	if err == nil {
		return nil
	}
	if !errors.Is(err, ErrNotCaptured) {
		return err
	}
	saved, err := n.saved()
	if err != nil {
		return err
	}
	now, err := n.readSettings()
	if err != nil {
		return err
	}
	if saved == nil {
		saved = o.Originals.before(now)
	}
	if err := n.writeRules(ruleset(o), saved); err != nil {
		return err
	}
	if err := n.writeSettings(wanted(saved)); err != nil {
		return err
	}
	return n.setGuard()
}

// Remove takes the rules away and restores the settings as they were before
// the first Apply. Captured connections end, since the kernel stops
// translating their addresses. Where nothing is in place it does nothing.
func (n *NS) Remove() error {
	n.apply.Lock()
	defer n.apply.Unlock()
	return n.remove()
}

func (n *NS) remove() error {
	found, err := n.findTable()
	if err != nil {
		return err
	}
	// The guard first: without the rules it lets nothing pass.
	if err := n.removeGuard(found != nil); err != nil || found == nil {
		return err
	}
	saved, err := n.saved()
	if err != nil {
		return err
	}
	// Settings first: should this process die in between, the saved values
	// are still there for the next attempt.
	if saved != nil {
		if err := n.writeSettings(saved); err != nil {
			return err
		}
	}
	c, err := n.nft()
	if err != nil {
		return err
	}
	c.DelTable(table)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("capture: %s: remove rules: %w", n.path, err)
	}
	n.forget()
	return nil
}

// Leave takes the rules away, as Remove does, but not the connections that the
// proxy has taken: two chains stay, for the sake of which the kernel goes on
// translating their addresses, and so do the settings. Nothing new is captured.
// It returns how many connections there are, and at least 1 when it has just
// taken the rules away: the proxy may not have accepted the last one yet. Once
// there are none, it removes all, as Remove does, and returns 0.
func (n *NS) Leave() (int, error) {
	n.apply.Lock()
	defer n.apply.Unlock()
	found, err := n.findTable()
	if err != nil {
		return 0, err
	}
	if found == nil { // but perhaps the guard, which lets nothing pass
		return 0, n.remove()
	}
	c, err := n.nft()
	if err != nil {
		return 0, err
	}
	diff, err := nft.Differs(c, n.fd(), table, append(translation(), chain{Name: savedChain}), savedChain)
	if err != nil {
		return 0, fmt.Errorf("capture: %s: %w", n.path, err)
	}
	all, err := n.Sockets()
	if err != nil {
		return 0, err
	}
	taken := 0
	for _, s := range all {
		if p := s.Local.Port(); s.State.open() && (p == mesh.PortOutbound || p == mesh.PortInbound) {
			taken++
		}
	}
	if diff == "" {
		if taken == 0 {
			err = n.remove()
		}
		return taken, err
	}
	saved, err := n.saved()
	if err != nil {
		return 0, err
	}
	// Nothing will vouch for what leaves. What the guard hung on goes last: a
	// packet that is lost now comes again when its address is still translated, and
	// the proxy has stopped to listen.
	if err := n.liftGuard(); err != nil {
		return 0, err
	}
	if saved == nil { // somebody altered it; the settings stay as they are
		saved = settings{}
	}
	return max(taken, 1), n.writeRules(translation(), saved)
}

func (n *NS) nft() (*nftables.Conn, error) {
	c, err := nftables.New(nftables.WithNetNSFd(n.fd()))
	if err != nil {
		return nil, fmt.Errorf("capture: %s: nftables: %w", n.path, err)
	}
	return c, nil
}

// writeRules replaces the table in one transaction.
func (n *NS) writeRules(chains []chain, saved settings) error {
	c, err := n.nft()
	if err != nil {
		return err
	}
	c.AddTable(table) // so that there is one to delete
	c.DelTable(table)
	c.AddTable(table)
	nft.Add(c, table, append(chains, savedRules(saved)))
	if err := c.Flush(); err != nil {
		return fmt.Errorf("capture: %s: write rules (the kernel needs nf_tables with nat, redir and reject for inet): %w", n.path, err)
	}
	return nil
}

// savedChunk bounds a comment: the kernel takes 256 bytes for it all.
const savedChunk = 200

// savedRules holds settings in comments, cut where they are too long for one.
func savedRules(s settings) chain {
	var lines []string
	for _, name := range slices.Sorted(maps.Keys(s)) {
		lines = append(lines, name+"="+s[name])
	}
	text := strings.Join(lines, ";")
	out := chain{Name: savedChain}
	for part := range slices.Chunk([]byte(text), savedChunk) {
		out.Rules = append(out.Rules, rule{Comment: string(part), Exprs: nft.Done()})
	}
	return out
}

// saved reads back what savedRules wrote: nil if there is none.
func (n *NS) saved() (settings, error) {
	rules, err := n.readRules()
	if err != nil {
		return nil, err
	}
	var text strings.Builder
	for _, r := range rules {
		if r.Chain == savedChain {
			text.WriteString(nft.CommentText(r.UserData))
		}
	}
	if text.Len() == 0 {
		return nil, nil
	}
	out := settings{}
	for line := range strings.SplitSeq(text.String(), ";") {
		name, value, ok := strings.Cut(line, "=")
		if !ok || !slices.Contains(settingNames, name) {
			return nil, nil // not ours: somebody altered it
		}
		out[name] = value
	}
	for _, name := range settingNames {
		if _, ok := out[name]; !ok && name != migrateRequests {
			return nil, nil
		}
	}
	return out, nil
}
