package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// The kernel's socket diagnosis protocol, linux/inet_diag.h and sock_diag.h.
const (
	sockDiagByFamily = 20
	sockDestroy      = 21
	diagRequestLen   = 56 // struct inet_diag_req_v2
	diagAnswerLen    = 72 // struct inet_diag_msg
	diagMark         = 15 // INET_DIAG_MARK
)

// diagKey names one socket: the addresses in the kernel's form, and the
// cookie, which no other socket ever has.
type diagKey struct {
	family uint8
	id     [48]byte // struct inet_diag_sockid
}

// diagConn is a socket of the diagnosis protocol. It is not safe for
// concurrent use.
type diagConn struct {
	fd  int
	seq uint32
	buf []byte
}

// withDiag runs f with the namespace's diagnosis socket, opening it first
// where needed. A socket on which f failed in the middle is not used again.
func (n *NS) withDiag(f func(*diagConn) error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.diag == nil {
		err := n.do(func() error {
			fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
			if err != nil {
				return fmt.Errorf("diagnosis socket: %w", err)
			}
			// The kernel answers at once; this only bounds a fault.
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
				return errors.Join(err, unix.Close(fd))
			}
			n.diag = &diagConn{fd: fd, buf: make([]byte, 1<<16)}
			return nil
		})
		if err != nil {
			return err
		}
	}
	err := f(n.diag)
	if errors.Is(err, errDiagBroken) {
		_ = n.diag.close() // the error at hand says more
		n.diag = nil
	}
	return err
}

// errDiagBroken: the socket's answers are out of step.
var errDiagBroken = errors.New("diagnosis socket")

func (d *diagConn) close() error { return unix.Close(d.fd) }

// allStates asks for sockets in every state.
const allStates = 0xffffffff

// dump lists the TCP sockets of one family in the given states, a bit for each.
func (d *diagConn) dump(family uint8, states uint32) ([]Socket, error) {
	var out []Socket
	err := d.request(sockDiagByFamily, unix.NLM_F_DUMP, diagKey{family: family}, states, func(body []byte) error {
		s, err := parseSocket(body)
		out = append(out, s)
		return err
	})
	return out, err
}

// find looks for one connection, in whatever state. The answer may be a
// listener instead.
func (d *diagConn) find(local, remote netip.AddrPort) (Socket, error) {
	if !local.Addr().Is6() || !local.Addr().IsLinkLocalUnicast() && !remote.Addr().IsLinkLocalUnicast() {
		return d.get(local, remote)
	}
	// These belong to an interface, and get does not find them without it.
	list, err := d.dump(unix.AF_INET6, allStates&^(1<<Listen))
	if err != nil {
		return Socket{}, err
	}
	for _, s := range list {
		if s.Local == local && s.Remote == remote {
			return s, nil
		}
	}
	return Socket{}, ErrNotFound
}

// get asks for one connection. The kernel may answer with a listener instead.
func (d *diagConn) get(local, remote netip.AddrPort) (s Socket, err error) {
	key := diagKey{family: unix.AF_INET6}
	if local.Addr().Is4() {
		key.family = unix.AF_INET
	}
	binary.BigEndian.PutUint16(key.id[0:], local.Port())
	binary.BigEndian.PutUint16(key.id[2:], remote.Port())
	copy(key.id[4:20], local.Addr().AsSlice())
	copy(key.id[20:36], remote.Addr().AsSlice())
	for i := 40; i < 48; i++ { // no cookie
		key.id[i] = 0xff
	}
	// The answer is the socket, then the acknowledgement.
	err = d.request(sockDiagByFamily, unix.NLM_F_ACK, key, allStates, func(body []byte) (err error) {
		s, err = parseSocket(body)
		return err
	})
	if errors.Is(err, os.ErrNotExist) {
		err = ErrNotFound
	}
	return s, err
}

// destroy ends the socket that key names, cookie included.
func (d *diagConn) destroy(key diagKey) error {
	err := d.request(sockDestroy, unix.NLM_F_ACK, key, allStates, nil)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		return ErrNotFound
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		return ErrUnsupported
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: CAP_NET_ADMIN over the namespace is needed", err)
	}
	return err
}

// request sends one message and hands the body of each answer to f, until
// the acknowledgement or the end of the dump.
func (d *diagConn) request(kind, flags uint16, key diagKey, states uint32, f func([]byte) error) error {
	d.seq++
	const total = unix.NLMSG_HDRLEN + diagRequestLen
	var m [total]byte
	binary.NativeEndian.PutUint32(m[0:], total)
	binary.NativeEndian.PutUint16(m[4:], kind)
	binary.NativeEndian.PutUint16(m[6:], unix.NLM_F_REQUEST|flags)
	binary.NativeEndian.PutUint32(m[8:], d.seq)
	m[16], m[17] = key.family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(m[20:], states)
	copy(m[24:], key.id[:])
	if err := unix.Sendto(d.fd, m[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("%w: send: %w", errDiagBroken, err)
	}
	for {
		n, _, err := unix.Recvfrom(d.fd, d.buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("%w: receive: %w", errDiagBroken, err)
		}
		done, err := d.answers(d.buf[:n], f)
		if done || err != nil {
			return err
		}
	}
}

// answers reads the messages of one datagram.
func (d *diagConn) answers(b []byte, f func([]byte) error) (done bool, err error) {
	for len(b) >= unix.NLMSG_HDRLEN {
		size := int(binary.NativeEndian.Uint32(b[0:]))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return true, fmt.Errorf("%w: answer of %d bytes in %d", errDiagBroken, size, len(b))
		}
		kind, flags := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:])
		seq, body := binary.NativeEndian.Uint32(b[8:]), b[unix.NLMSG_HDRLEN:size]
		b = b[min((size+3)&^3, len(b)):]
		switch {
		case seq != d.seq:
			return true, fmt.Errorf("%w: answer to another question", errDiagBroken)
		case flags&unix.NLM_F_DUMP_INTR != 0:
			return true, fmt.Errorf("%w: the list was interrupted", errDiagBroken)
		case kind == unix.NLMSG_DONE || kind == unix.NLMSG_ERROR:
			if len(body) < 4 {
				return true, fmt.Errorf("%w: short end", errDiagBroken)
			}
			if code := int32(binary.NativeEndian.Uint32(body)); code < 0 {
				return true, unix.Errno(-code)
			}
			return true, nil
		case kind == sockDiagByFamily && f != nil:
			if err := f(body); err != nil {
				return true, fmt.Errorf("%w: %w", errDiagBroken, err)
			}
		default:
			return true, fmt.Errorf("%w: unexpected answer of type %d", errDiagBroken, kind)
		}
	}
	return false, nil
}

// parseSocket reads a struct inet_diag_msg and its attributes.
func parseSocket(b []byte) (Socket, error) {
	if len(b) < diagAnswerLen {
		return Socket{}, fmt.Errorf("answer of %d bytes, want %d", len(b), diagAnswerLen)
	}
	s := Socket{State: State(b[1]), key: diagKey{family: b[0]}}
	id := s.key.id[:]
	copy(id, b[4:52])
	s.Local = diagAddr(b[0], id[4:20], binary.BigEndian.Uint16(id[0:]))
	s.Remote = diagAddr(b[0], id[20:36], binary.BigEndian.Uint16(id[2:]))
	for b = b[diagAnswerLen:]; len(b) >= 4; {
		size, kind := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])
		if size < 4 || size > len(b) {
			return Socket{}, fmt.Errorf("attribute of %d bytes in %d", size, len(b))
		}
		if kind == diagMark && size == 8 {
			s.Mark = binary.NativeEndian.Uint32(b[4:])
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return s, nil
}

func diagAddr(family uint8, b []byte, port uint16) netip.AddrPort {
	if family == unix.AF_INET {
		b = b[:4]
	}
	a, _ := netip.AddrFromSlice(b) // 4 or 16 bytes
	return netip.AddrPortFrom(a.Unmap(), port)
}
