package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// dialResult is what dial prints.
type dialResult struct {
	OK     bool    `json:"ok"`
	ID     string  `json:"id,omitempty"` // who answered
	Local  string  `json:"local,omitempty"`
	Remote string  `json:"remote,omitempty"`
	Error  string  `json:"error,omitempty"`
	MS     float64 `json:"ms"` // from the first instruction to the answer
}

// dial asks who is on the other end of the connection that main made.
func dial(args []string, early done) error {
	f := flag.NewFlagSet("dial", flag.ContinueOnError)
	timeout := f.Duration("timeout", 10*time.Second, "for the answer")
	rest, err := parse(f, args)
	if err != nil {
		return err
	}
	if len(rest) != 1 || len(args) == 0 || args[0] != rest[0] {
		return errors.New("dial: name one address, HOST:PORT, right after dial")
	}
	r := dialResult{}
	err = early.err
	if err == nil {
		r.Local, r.Remote = early.conn.LocalAddr().String(), early.conn.RemoteAddr().String()
		_ = early.conn.SetDeadline(time.Now().Add(*timeout))
		r.ID, err = askID(early.conn, rest[0], "")
		_ = early.conn.Close()
	}
	r.OK, r.MS = err == nil, float64(time.Since(early.start).Microseconds())/1000
	if err != nil {
		r.Error = err.Error()
	}
	printLine(r)
	if err != nil {
		return errors.New("no answer")
	}
	return nil
}

// askID asks a server of this program for its name.
func askID(c net.Conn, host, mark string) (string, error) {
	if _, err := fmt.Fprintf(c, "GET /id HTTP/1.1\r\nHost: %s\r\nX-Mark: %s\r\nConnection: close\r\n\r\n", host, mark); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("answer %s", resp.Status)
	}
	return strings.TrimSpace(string(body)), nil
}

// call makes a connection, asks once, and ends it.
func call(ctx context.Context, address, mark string) (string, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(deadline)
	}
	return askID(c, address, mark)
}
