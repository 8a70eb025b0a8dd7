package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"
)

// Ports of the server in each server pod.
const (
	portEcho   = 8080 // sends back what it gets
	portSink   = 8081 // answers the end of a stream with its length
	portSource = 8082 // sends for as many nanoseconds as it is told
)

// serve answers all kinds of load, until it is killed.
func serve() error {
	errs := make(chan error)
	for port, answer := range map[int]func(net.Conn){portEcho: echo, portSink: sink, portSource: source} {
		l, err := net.Listen("tcp", ":"+strconv.Itoa(port))
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					errs <- err
					return
				}
				go func() { defer func() { _ = c.Close() }(); answer(c) }()
			}
		}()
	}
	fmt.Println(lineReady)
	return <-errs
}

func echo(c net.Conn) {
	buf := make([]byte, 4<<10)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

func sink(c net.Conn) {
	buf := make([]byte, chunk)
	total := uint64(0)
	for {
		n, err := c.Read(buf)
		total += uint64(n)
		if err == io.EOF {
			_, _ = c.Write(binary.BigEndian.AppendUint64(nil, total))
			return
		}
		if err != nil {
			return
		}
	}
}

func source(c net.Conn) {
	var wish [8]byte
	if _, err := io.ReadFull(c, wish[:]); err != nil {
		return
	}
	buf := make([]byte, chunk)
	end := time.Now().Add(time.Duration(binary.BigEndian.Uint64(wish[:])))
	for time.Now().Before(end) {
		if _, err := c.Write(buf); err != nil {
			return
		}
	}
}
