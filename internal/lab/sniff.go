package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// Sniffer looks at every packet of one interface for byte strings. It keeps
// counts, not packets. Its methods are safe for concurrent use.
type Sniffer struct {
	fd       int
	stop     context.CancelFunc
	done     chan struct{}
	canaries [][]byte // never changed

	mu      sync.Mutex
	counts  []int // guarded by mu; beside canaries
	packets int   // guarded by mu
	lost    int   // guarded by mu
	err     error // guarded by mu
}

// Sniff watches all traffic of the bridge, between pods too, until ctx ends
// or the sniffer is closed.
func (l *Lab) Sniff(ctx context.Context, canaries ...[]byte) (*Sniffer, error) {
	return newSniffer(ctx, l.bridge.Name, canaries)
}

// Sniff watches an interface of the pod ("eth0", "lo") until ctx ends or the
// sniffer is closed. On lo each packet is seen twice.
func (p *Pod) Sniff(ctx context.Context, iface string, canaries ...[]byte) (*Sniffer, error) {
	var s *Sniffer
	err := p.Do(func() (err error) {
		s, err = newSniffer(ctx, iface, canaries)
		return err
	})
	return s, err
}

// SniffAt watches an interface in the network namespace at a path, such as a
// node of a cluster has, until ctx ends or the sniffer is closed.
func SniffAt(ctx context.Context, path, iface string, canaries ...[]byte) (s *Sniffer, err error) {
	err = In(path, func() (err error) {
		s, err = newSniffer(ctx, iface, canaries)
		return err
	})
	return s, err
}

// newSniffer opens the socket in the calling thread's namespace.
func newSniffer(ctx context.Context, iface string, canaries [][]byte) (s *Sniffer, err error) {
	for _, c := range canaries {
		if len(c) == 0 {
			return nil, errors.New("lab: sniff: an empty canary is everywhere: name the bytes to look for")
		}
	}
	dev, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, fmt.Errorf("lab: sniff: %w", err)
	}
	const all = unix.ETH_P_ALL
	proto := bits.ReverseBytes16(all)
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		proto = all
	}
	// Protocol 0: nothing is received before bind names the interface.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("lab: sniff: packet socket: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	const buffer = 32 << 20
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer); err != nil {
		// Not root: as much as net.core.rmem_max allows. Lost tells if it was too little.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, buffer); err != nil {
			return nil, fmt.Errorf("lab: sniff: receive buffer: %w", err)
		}
	}
	mreq := unix.PacketMreq{Ifindex: int32(dev.Index), Type: unix.PACKET_MR_PROMISC}
	if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &mreq); err != nil {
		return nil, fmt.Errorf("lab: sniff: promiscuous mode on %s: %w", iface, err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: dev.Index}); err != nil {
		return nil, fmt.Errorf("lab: sniff: bind to %s: %w", iface, err)
	}
	s = &Sniffer{fd: fd, done: make(chan struct{}), counts: make([]int, len(canaries))}
	for _, c := range canaries {
		s.canaries = append(s.canaries, bytes.Clone(c))
	}
	ctx, s.stop = context.WithCancel(ctx)
	go s.run(ctx)
	return s, nil
}

// run reads packets until ctx ends, then what is still queued.
func (s *Sniffer) run(ctx context.Context) {
	defer close(s.done)
	buf := make([]byte, 1<<18) // larger than any offloaded packet
	for {
		n, _, err := unix.Recvfrom(s.fd, buf, 0)
		switch {
		case err == nil:
			s.look(buf[:n])
		case err == unix.EINTR:
		case err == unix.EAGAIN && ctx.Err() != nil:
			return
		case err == unix.EAGAIN:
			s.statistics()
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, 20)
		default:
			s.mu.Lock()
			s.err = fmt.Errorf("lab: sniff: read: %w", err)
			s.mu.Unlock()
			return
		}
	}
}

func (s *Sniffer) look(packet []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.packets++
	for i, c := range s.canaries {
		s.counts[i] += bytes.Count(packet, c)
	}
}

// statistics adds the kernel's drop counter, which reading resets.
func (s *Sniffer) statistics() {
	st, err := unix.GetsockoptTpacketStats(s.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil || st.Drops == 0 {
		return
	}
	s.mu.Lock()
	s.lost += int(st.Drops)
	s.mu.Unlock()
}

// Count is how often the canary was seen whole within one packet; one that is
// split over two packets is not found. It panics for a canary that was not
// given to Sniff, because 0 would be a false comfort.
func (s *Sniffer) Count(canary []byte) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range s.canaries {
		if bytes.Equal(c, canary) {
			return s.counts[i]
		}
	}
	panic(fmt.Sprintf("lab: canary %q was not given to Sniff", canary))
}

// Packets is how many packets were looked at.
func (s *Sniffer) Packets() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.packets
}

// Lost is how many packets the kernel dropped because they were not read in
// time. A count of 0 canaries means something only if it is 0.
func (s *Sniffer) Lost() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lost
}

// Close looks at the packets that are still queued and stops. The counts stay
// readable. It is idempotent and returns the error that ended reading, if any.
func (s *Sniffer) Close() error {
	s.stop()
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd >= 0 {
		if st, err := unix.GetsockoptTpacketStats(s.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			s.lost += int(st.Drops)
		}
		unix.Close(s.fd)
		s.fd = -1
	}
	return s.err
}
